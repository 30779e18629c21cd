"""Measure every causal-LM type of transformers: `python -m stemma.census [--write PATH] [TYPE ...]`."""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

from stemma.census.configs import model_types
from stemma.census.measure import WRONG, measure
from stemma.census.report import write

__all__ = ["main"]


def main() -> int:
    """Print one line a type; exit with 1 when a type is silently wrong."""
    parser = argparse.ArgumentParser(prog="python -m stemma.census", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types to measure (default: all)")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the support table (all types) to this file")
    options = parser.parse_args()
    if options.write and options.types:
        parser.error("--write needs all types: leave the list of types out")
    unknown = set(options.types) - set(model_types())
    if unknown:
        parser.error(f"not a causal-LM type of transformers {transformers.__version__}: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # these models are too small for more
    measurements = []
    for model_type in options.types or model_types():
        found = measure(model_type)
        measurements.append(found)
        gradient = "" if found.gradient is None else f" gradient {found.gradient:.0e}"
        print(
            f"{found.result:12} {model_type:26} {found.difference:.0e} {found.difference_double:.0e}{gradient} control "
            f"{found.control:.0e} {found.seconds:.1f} s  {', '.join(found.exercised)}  {found.reason}",
            flush=True,
        )
    counts = Counter(found.result for found in measurements)
    print(", ".join(f"{number} {result}" for result, number in counts.most_common()))
    if options.write:
        write(options.write, measurements)
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
