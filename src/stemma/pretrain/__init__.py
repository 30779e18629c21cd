"""Pretraining that treats a prefix in its own way: one method per file; shared pieces start with an underscore."""
