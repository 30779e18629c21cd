"""Keys and values of prefixes as objects: which runs of tokens are shared, and the tensors that hold them once."""
