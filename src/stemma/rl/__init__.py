"""Reinforcement learning over shared prefixes: one method a file, over the trainer in `engine/`; TRL's in `trl/`."""
