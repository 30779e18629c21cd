"""The measurements behind the README's table: `python benchmarks/run.py`, then `python benchmarks/tables.py`."""
