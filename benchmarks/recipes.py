"""Rows and page of the reproductions: `python benchmarks/recipes.py tempo prefix-rft prefix-rl pppo`.

Runs each of them as `stemma run` does (finished runs are not repeated), keeps its measurements in
`results/<room>_<method>.jsonl` and its plot in `docs/figures/`, and makes docs/recipes.md and docs/methods.md from all
rows. Without a method: only the pages. `--check` writes nothing; its exit status is 1 when docs/recipes.md is not what
the rows say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import methods  # noqa: E402
from benchmarks.rows import RESULTS, Recorder, Row, load, write_atomically  # noqa: E402
from benchmarks.tables import prose  # noqa: E402
from stemma.cli.methods import ROOMS  # noqa: E402
from stemma.cli.methods import methods as methods_by_name  # noqa: E402
from stemma.cli.run import recipes  # noqa: E402
from stemma.recipes._runs import Options  # noqa: E402
from stemma.recipes._tables import notes, tables  # noqa: E402

PAGE, FIGURES = ROOT / "docs" / "recipes.md", ROOT / "docs" / "figures"
INTRODUCTION = (
    """`stemma run METHOD` repeats, on one core in 5 to 60 minutes, the comparison that a paper rests its claims on,
    with models that are made and trained here. The numbers show that a method does what it says and in which regime,
    not how much it gains on a large model. Where a method works on a given model, `--model FOLDER_OR_ID` measures it on
    a pretrained one too; there each passage or problem counts as a seed.""",
    """Values are means over seeds with their standard error. A claim says that a value is above a threshold: it
    "holds" when an exact one-sided test gives p < 0.05, is "in the mean" when the mean alone points that way, else it
    "does not hold". The test flips the signs of the paired differences of each seed, which cannot give less than 1/32
    with five seeds: fewer are "too few seeds". Shares of successes have a binomial test; counts of tokens, operations
    and bytes repeat exactly and need none.""",
    """Seconds were measured on a machine that did other work too. The commit is that of the report: finished runs are
    kept, and some were made by earlier commits with the same settings.""",
)


def room_of(method: str) -> str:
    """The room of a method, such as `rl`."""
    return methods_by_name()[method].room


def rows_of(report: dict[str, Any], common: dict[str, Any]) -> list[Row]:
    """One row per measurement of a report."""
    found = []
    for measurement in report["measurements"]:
        value, error = measurement["value"], measurement["error"]
        spread = None if error is None else [value - error, value + error]
        about = {"recipe": report["recipe"], "title": report["title"], "shapes": report["about"]}
        found.append({**about, **measurement, "spread": spread, **common})
    return found


def save(report: dict[str, Any], folder: Path, figures: Path | None) -> None:
    """Write the rows and the plot of one reproduction; without `figures` the rows alone."""
    name = report["recipe"]
    room, rows = room_of(name), rows_of(report, Recorder(threads=1).common)
    write_atomically(folder / f"{room}_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if figures is None:
        return
    temporary = figures / f".{room}-{name}.tmp"
    shutil.copyfile(report["files"]["png"], temporary)
    os.replace(temporary, figures / f"{room}-{name}.png")


def page(folder: Path = RESULTS) -> str:
    """docs/recipes.md."""
    parts = ["<!-- Made by benchmarks/recipes.py from benchmarks/results; do not edit. -->\n# Reproductions"]
    parts += [prose(paragraph) for paragraph in INTRODUCTION]
    for room, heading in ROOMS.items():
        methods = [name for name in recipes() if room_of(name) == room]
        measured = [(name, rows) for name in methods if (rows := load(folder / f"{room}_{name}.jsonl"))]
        if measured:
            parts += [f"## {heading}", *map(prose, notes(f"_{room}", ()))]
        for name, rows in measured:
            parts += _section(name, f"{room}-{name}", rows, load(folder / "real" / f"{room}_{name}.jsonl"))
    return "\n\n".join(parts) + "\n"


def _section(name: str, figure: str, rows: list[Row], real: list[Row]) -> list[str]:
    """What the page says about one method."""
    parts = [
        f"### {rows[0]['title']}",
        *map(prose, notes(name.replace("-", "_"), rows)),
        f"![curves of {name}](figures/{figure}.png)",
        *tables(rows, rows[0]["shapes"]),
        _measured(rows[0]),
    ]
    if real:
        parts += [f"#### {name} on a pretrained model", *tables(real, real[0]["shapes"]), _measured(real[0])]
    return parts


def _measured(row: Row) -> str:
    """On what a row was measured."""
    versions, machine = row["versions"], row["machine"]
    about = f"""{machine["cpu"]}, one thread; torch {versions["torch"]}, transformers {versions["transformers"]}; commit
        {row["commit"][:7]}{"+" if row["dirty"] else ""}; {row["date"]}."""
    return prose(about)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="reproductions to run; none: only the page")
    parser.add_argument("--output-dir", type=Path, default=Options.output_dir)
    parser.add_argument("--cache-dir", type=Path, default=Options.cache_dir)
    parser.add_argument("--model", help="a pretrained model to run them on; rows go to results/real")
    parser.add_argument("--check", action="store_true", help="only compare; status 1 when the page is stale")
    given = parser.parse_args(arguments)
    unknown = sorted({*given.methods} - {*recipes()})
    if unknown:
        parser.error(f"no reproduction of {unknown[0]}; there are {', '.join(recipes())}")
    if given.check:
        stale = PAGE.read_text(encoding="utf-8") != page()
        if stale:
            print(f"{PAGE.relative_to(ROOT)} is not what the result rows say; run: python benchmarks/recipes.py")
        sys.exit(stale)
    for name in given.methods:
        module = import_module(recipes()[name][0])
        options = Options(model=given.model, output_dir=given.output_dir, cache_dir=given.cache_dir)
        save(module.run(options), RESULTS / "real" if given.model else RESULTS, None if given.model else FIGURES)
    write_atomically(PAGE, page())
    methods.main([])  # the other page that is made from these rows


if __name__ == "__main__":
    main()
