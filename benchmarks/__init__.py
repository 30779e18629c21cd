"""The measurements behind the README's numbers: `python benchmarks/run.py`, then `python benchmarks/tables.py`."""
