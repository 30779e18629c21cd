"""Tables of stored measurements, for reports, for pages and for the terminal. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stemma.recipes._statistics import verdict

__all__ = ["COLUMNS", "COUNTS", "claims_table", "notes", "tables"]

COLUMNS = {
    "pass@1": "pass@1",
    "area": "area under the curve",
    "sampled": "sampled tokens",
    "optimised": "optimised tokens",
    "encoded": "encoded per update",
    "encoded_without_sharing": "without sharing",
    "sampling_encoded": "encoded to sample",
    "sampling_without_sharing": "without sharing",
    "step_seconds": "s per step",
    "update_seconds": "update, s",
    "update_seconds_plain": "update without sharing, s",
    "gradient_error": "gradient, shared − plain",
}
"""Metrics of every method, and the heads of their columns."""
COUNTS = frozenset(COLUMNS) - {
    *("pass@1", "area", "step_seconds", "update_seconds", "update_seconds_plain", "gradient_error"),
}
"""Metrics of `COLUMNS` that count tokens."""


def tables(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None = None) -> list[str]:
    """Markdown of stored measurements: the setting, claims, methods, the rest."""
    parts = []
    if about:
        parts.append(markdown_table(["setting", ""], [[str(key), str(value)] for key, value in about.items()]))
    claims = [row for row in rows if row["claim"]]
    if claims:
        parts.append(claims_table(claims))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["metric"] in COLUMNS))
    found = {(row["method"], row["metric"]): row for row in rows if not row["claim"]}
    if methods:
        body = [[m, *(_cell(found.get((m, metric)), metric) for metric in COLUMNS)] for m in methods]
        parts.append(markdown_table(["method", *COLUMNS.values()], body))
    rest = [row for row in rows if row["metric"] not in COLUMNS and not row["claim"]]
    for group in _connected(rest):
        columns = list(dict.fromkeys(row["method"] for row in group))
        body = []
        for metric in dict.fromkeys(row["metric"] for row in group):
            own = [found.get((method, metric)) for method in columns]
            count = max(row["repeats"] for row in own if row)
            body.append([metric, *("–" if row is None else _value(row) for row in own), str(count)])
        parts.append(markdown_table(["also measured", *columns, "n"], body))
    return parts


def _connected(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows in groups that have no method and no metric in common, for a table each."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in rows:
        near = [g for g in groups if any(r["method"] == row["method"] or r["metric"] == row["metric"] for r in g)]
        groups = [g for g in groups if g not in near] + [[*(r for g in near for r in g), row]]
    return groups


def claims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of measurements that test a claim: that the value is above the one beside it."""
    head = ["the paper's claim", "measured here", "value", "claimed above", "p", "verdict", "n"]
    body = [
        [r["claim"], r["metric"], _value(r), f"{r['threshold']:g}", _p_value(r), verdict(r), str(r["repeats"])]
        for r in rows
    ]
    return markdown_table(head, body)


def notes(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paragraphs of `NAME.md` beside this file, what to know before reading the tables of a reproduction.

    They hold no result: `{METHOD | METRIC}` stands for a measured value, or for "not measured".
    """
    path = Path(__file__).with_name(f"{name}.md")
    if not path.exists():
        return []
    values = {f"{{{row['method']} | {row['metric']}}}": _value(row) for row in rows}
    text = re.sub(
        r"\{[^{}|]+ \| [^{}]+\}", lambda m: values.get(" ".join(m[0].split()), "not measured"), path.read_text("utf-8")
    )
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Every column but the first is right-aligned."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def _value(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    sign = "+" if row["baseline"] and not row["threshold"] and row["value"] >= 0 else ""
    form = ",.0f" if abs(row["value"]) >= 1000 else ".3f"
    error = "" if row["error"] is None else f" ± {row['error']:{form}}"
    return f"{sign}{row['value']:{form}}{error}{' ' + row['unit'] if row['unit'] else ''}"


def _p_value(row: Mapping[str, Any]) -> str:
    if row["test"] == "count":
        return "a count"
    if row["p_value"] is None:
        return "–"
    return f"{row['p_value']:.2g}" if row["p_value"] >= 0.001 else "< 0.001"


def _cell(row: Mapping[str, Any] | None, metric: str) -> str:
    if row is None or row["value"] is None:
        return "–"
    if metric in COUNTS:
        return f"{row['value']:,.0f}"
    if metric == "gradient_error":
        return f"{row['value']:.0e}"
    if "seconds" in metric:
        return f"{row['value']:.2f}"
    return f"{row['value']:.3f}" + ("" if row["error"] is None else f" ± {row['error']:.3f}")
