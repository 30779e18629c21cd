"""The `stemma` command: one file per sub-command, found by its name."""
