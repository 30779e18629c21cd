"""The only place that knows transformers: the attention adapter, scoring, verification, tiny models."""
