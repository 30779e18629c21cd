"""transformers' models seen from outside: attention, masks, limits, loading, tiny models."""
