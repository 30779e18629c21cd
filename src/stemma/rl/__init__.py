"""Reinforcement learning over shared prefixes: one method per file; pieces that they share start with an underscore."""
