"""Rows of reproductions that were measured before claims had a test and a threshold, in the present form.

`python benchmarks/convert_claims.py` rewrites results/<room>_<method>.jsonl; converted rows stay as they are.

- `expected` goes; `threshold` and `test` come, 0 and None in rows without a claim.
- A value of which its threshold had been taken ("..., minus 0.7") gets it back, and `threshold` is 0.7; so does the
  success rate of a binomial test against a baseline.
- A claim without a p-value (no value of each seed was kept) has the sign-flip test without one: "too few seeds" below
  five of them, "in the mean" at most.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.rows import RESULTS, load, write_atomically  # noqa: E402

BINOMIAL = " − that of the start (binomial test, all seeds)"


def converted(row: dict[str, Any]) -> dict[str, Any]:
    """One row in the present form."""
    if "expected" not in row:
        return row
    row = {key: value for key, value in row.items() if key != "expected"} | {"threshold": 0.0, "test": None}
    if row["claim"]:
        row["test"] = "sign-flip"
        taken = re.search(r", minus ([0-9.]+)", row["metric"])
        if taken:
            row = raised(row, float(taken[1])) | {"metric": row["metric"].replace(taken[0], "")}
        if row["metric"].endswith(BINOMIAL):
            words = row["metric"].removesuffix(BINOMIAL) + ", samples of all seeds; claimed above that of the start"
            row = raised(row, row["baseline_value"]) | {"metric": words, "test": "binomial"}
    return row


def raised(row: dict[str, Any], threshold: float) -> dict[str, Any]:
    """The row with the threshold beside its value in place of taken from it."""
    spread = row["spread"] and [edge + threshold for edge in row["spread"]]
    return row | {"value": row["value"] + threshold, "spread": spread, "threshold": threshold}


def main() -> None:
    """The command line."""
    for path in sorted(RESULTS.glob("*_*.jsonl")):
        rows = load(path)
        if rows and "recipe" in rows[0]:
            write_atomically(path, "".join(json.dumps(converted(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
