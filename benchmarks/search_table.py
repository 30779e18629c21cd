"""Write the tables of docs/search.md from the rows of search.py: `python benchmarks/search_table.py`.

`--check` writes nothing and exits with status 1 when the page is not what the rows say.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_block  # noqa: E402
from benchmarks.rows import RESULTS, Row, find, load  # noqa: E402

PAGE = ROOT / "docs" / "search.md"
MEASURES = ("AP", "nDCG@10", "R@100")
METHODS = {
    "fts5": "words, FTS5",
    "bm25s": "words, bm25s",
    "sparse": "SPLADE-tiny",
    "dense": "MiniLM",
    "rrf": 'mixed, `"rrf"`',
    "linear": 'mixed, `"linear"`',
    "feedback alone": "MiniLM with feedback",
    "before": 'mixed, `feedback="before"`',
    "after": 'mixed, `feedback="after"`',
    "both": 'mixed, `feedback="both"`',
}


def block(rows: list[Row]) -> str:
    """What stands between the page's markers."""
    return f"{quality(rows)}\n\n{speed(rows)}\n\n{setting(rows)}"


def quality(rows: list[Row]) -> str:
    """Measures by collection, and the p-values of the last method against the others."""
    measured = {row["workload"]: row["shapes"] for row in rows if row["metric"] == "AP"}
    names = [*sorted(name for name in measured if name != "pooled"), "pooled"]
    texts = {name: f"{measured[name]['texts']:,} texts, " if name != "pooled" else "" for name in names}
    head = [f"{name} ({texts[name]}{measured[name]['queries']} queries)" for name in names]
    lines = [["AP / nDCG@10 / R@100", *head, "p (AP, pooled)"], ["---"] + ["---:"] * (len(names) + 1)]
    for method, label in METHODS.items():
        cells = [figures(rows, name, method) for name in names]
        test = find(rows, workload="pooled", method="both", metric="AP p", baseline=method)
        p = "–" if test is None else (f"{test['value']:.3f}" if test["value"] >= 0.001 else "< 0.001")
        if any(cell != "–" for cell in cells):
            lines.append([label, *cells, p])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figures(rows: list[Row], workload: str, method: str) -> str:
    """The measures of one method on one collection; the best of a column is bold."""
    cells = []
    for measure in MEASURES:
        values = {
            row["method"]: row["value"] for row in rows if (row["workload"], row["metric"]) == (workload, measure)
        }
        if method not in values:
            return "–"
        figure = f"{values[method]:.3f}".removeprefix("0")
        cells.append(f"**{figure}**" if values[method] == max(values.values()) else figure)
    return " / ".join(cells)


def speed(rows: list[Row]) -> str:
    """Times and sizes at 100,000 abstracts."""
    lines = ["| 100,000 abstracts | median | 95 % below |", "| --- | ---: | ---: |"]
    for method in dict.fromkeys(row["method"] for row in rows if row["metric"] == "p95"):
        median, p95 = (find(rows, workload="100k", method=method, metric=metric) for metric in ("median", "p95"))
        assert median is not None
        assert p95 is not None
        lines.append(
            f"| {method.replace('both', 'mixed, feedback both')} | {median['value']:.1f} ms | {p95['value']:.1f} ms |"
        )
    builds = []
    for row in rows:
        if row["metric"] == "build":
            disk = find(rows, workload="100k", method=row["method"], metric="disk")
            assert disk is not None
            builds.append(f"{row['method']} {row['value']:.0f} s and {disk['value'] / 2**20:,.0f} MiB")
    peak = find(rows, workload="100k", metric="peak memory")
    assert peak is not None
    return "\n".join(lines) + (
        f"\n\nBuilding took {', '.join(builds)} (fts5 with the texts themselves, dense without encoding). With all "
        f"of them open, a process takes {peak['value'] / 2**20:,.0f} MiB at most."
    )


def setting(rows: list[Row]) -> str:
    """Machine, versions, commit and date."""
    row, versions = rows[0], {name: version for row in rows for name, version in row["versions"].items()}
    named = ", ".join(f"{name} {versions[name]}" for name in ("sentence-transformers", "bm25s", "faiss-cpu"))
    commits = sorted({row["commit"][:7] + ("+" if row["dirty"] else "") for row in rows})
    return (
        'The best of a column is bold; p: paired permutation test of `feedback="both"` against the line. Times '
        f"are of the CPU, on one thread, {row['machine']['cpu']}; {named}; commit {', '.join(commits)}; "
        f"{max(row['date'] for row in rows)}. `python benchmarks/search.py` measures again."
    )


if __name__ == "__main__":
    sys.exit(write_block(PAGE, "search", block(load(RESULTS / "search.jsonl"))))
