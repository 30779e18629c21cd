"""`python -m benchmarks [options of run.py]`: measure, then make the tables and figures from the rows."""

from benchmarks import run, tables

if run.main():
    tables.main([])
