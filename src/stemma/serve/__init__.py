"""Answers that a prefix can give while serving: one method per file; shared pieces start with an underscore."""
