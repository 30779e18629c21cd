"""Pieces of a training run: seeds, optimiser, checkpoints, tracking, the report, the supervised warm-up."""
