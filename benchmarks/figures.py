"""The figures of docs/benchmarks.md, drawn from the result rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, find

COLOURS = {
    "hf_padded": "#8c8c8c",
    "each_row_alone": "#c9a227",
    "prefix_grouper": "#3b6ea8",
    "prefix_grouper_trimmed": "#8fb3d9",
    "stemma": "#2e8b57",
    "stemma_streamed": "#7ccba2",
}


def draw(rows: dict[str, list[Row]], folder: Path) -> None:
    """Write speed.svg and, with W7's rows, memory.svg; equal rows give equal files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "stemma", "font.size": 10, "axes.spines.top": False})
    folder.mkdir(parents=True, exist_ok=True)
    one_thread = {section: [row for row in found if row["threads"] == 1] for section, found in rows.items()}
    _save(_speed(one_thread["speed"]), folder / "speed.svg")
    if find(one_thread["memory"], workload="W7-64", method="stemma_streamed"):
        _save(_memory(one_thread["memory"]), folder / "memory.svg")


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    os.replace(temporary, path)


def _speed(rows: list[Row]) -> Any:
    from matplotlib.figure import Figure

    from benchmarks.baselines import METHODS

    names = [f"W{number}" for number in range(1, 7)]
    names = [name for name in names if find(rows, workload=name, method="stemma", metric="fraction_of_bound")]
    methods = ("prefix_grouper", "prefix_grouper_trimmed", "stemma")
    figure = Figure(figsize=(8, 3.4))
    axes = figure.subplots()
    width = 0.26
    for place, method in enumerate(methods):
        for x, name in enumerate(names):
            row = find(rows, workload=name, method=method, metric="cpu_speedup", baseline="hf_padded")
            if row is None:
                continue
            low, high = row["spread"]
            axes.bar(
                x + (place - 1) * width,
                row["value"],
                width,
                color=COLOURS[method],
                yerr=[[row["value"] - low], [high - row["value"]]],
                error_kw={"linewidth": 0.8},
                label=METHODS[method].label if x == 0 else None,
            )
    for x, name in enumerate(names):
        row = find(rows, workload=name, method="stemma", metric="fraction_of_bound")
        assert row is not None
        axes.hlines(
            row["shapes"]["speed_bound"], x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1,
            label="FLOPs bound" if x == 0 else None,
        )  # fmt: skip
    axes.axhline(1, color="#8c8c8c", linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("speed-up over padded")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _memory(rows: list[Row]) -> Any:
    from matplotlib.figure import Figure

    from benchmarks.baselines import METHODS

    counts = (8, 32, 64)
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    for method in ("hf_padded", "each_row_alone", "stemma", "stemma_streamed"):
        found = [find(rows, workload=f"W7-{count}", method=method) for count in counts]
        points = [(count, row["value"] / 2**20) for count, row in zip(counts, found) if row is not None]
        axes.plot(*zip(*points), marker="o", color=COLOURS[method], label=METHODS[method].label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("responses to one prompt (P 512, R 64)")
    axes.set_ylabel("peak memory, MiB")
    axes.legend(frameon=False, fontsize=9)
    return figure
