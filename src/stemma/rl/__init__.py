"""Reinforcement learning over shared prefixes: one method per file, over `engine/`."""
