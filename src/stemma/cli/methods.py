"""The methods: what each is for, its paper, what the paper claims and what was measured here.

Without a method: all of them, in short. With one: every claim that was tested and every number. Nothing is claimed by
hand: numbers come from the rows that `stemma run` left in benchmarks/results, which an installed wheel holds as
stemma/_results, and a method without rows is "not measured here".
"""

import ast
import difflib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from stemma.errors import InvalidDataError
from stemma.recipes._statistics import verdict
from stemma.recipes._tables import notes, tables

__all__ = [
    "ROOMS",
    "Config",
    "Method",
    "Paper",
    "main",
    "measured",
    "method_files",
    "method_name",
    "methods",
    "outcome",
    "recipe_files",
]

ROOMS = {
    "rl": "Reinforcement learning",
    "pretrain": "Pre-training",
    "tune": "Fine-tuning",
    "serve": "Serving",
    "synth": "Synthetic data",
    "compress": "Compression",
    "retrieve": "Retrieval",
    "probe": "Probes",
}
"""Folders of methods, in the order in which they are shown. A file or package in them whose docstring names a source is
a method."""

_SOURCE = re.compile(r'Source: "([^"]+)", (\d{4}), arXiv (\d{4}\.\d{5})(?!\d)')
_NO_RUN = re.compile(r"No `run`: (.+?\.)(?= [A-Z]|\n\n|$)", re.DOTALL)
_FIELDS = {"claim", "test", "threshold", "date", "commit", "machine", "shapes"}
_VERDICTS = ("holds", "in the mean", "does not hold", "too few seeds", "–")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma methods`."""

    method: Annotated[str | None, tyro.conf.Positional] = None
    """The method; none: all of them."""


@dataclass(frozen=True)
class Paper:
    """Where a method is from."""

    title: str
    year: int
    arxiv: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as its file and its rows describe it."""

    name: str
    """As `stemma run` writes it, with dashes."""
    room: str
    purpose: str
    """First line of the file's docstring."""
    paper: Paper
    reproduced: bool
    """Whether `stemma run` knows it."""
    unreproduced_because: str | None
    """The reason that its docstring gives where there is no reproduction."""
    rows: tuple[Mapping[str, Any], ...]
    """Measurements of its reproduction, each with machine, versions, commit and date; empty: not measured here."""
    real_rows: tuple[Mapping[str, Any], ...]
    """The same on a pretrained model, of `stemma run METHOD --model`; empty: not measured."""

    @property
    def claims(self) -> list[Mapping[str, Any]]:
        """The rows that test a claim of the paper."""
        return [row for row in self.rows if row["claim"]]

    @property
    def real_claims(self) -> list[Mapping[str, Any]]:
        """The same on a pretrained model."""
        return [row for row in self.real_rows if row["claim"]]


def methods(results: Path | None = None) -> dict[str, Method]:
    """All methods by name, found by their place and read without importing them.

    Args:
        results: folder of the rows; that of this installation when None.

    Raises:
        InvalidDataError: a method's docstring does not say its source as the others do, or the rows are missing.
    """
    (package,) = import_module("stemma").__path__
    results = _results(Path(package)) if results is None else results
    found = {}
    for room in ROOMS:
        for path in method_files(Path(package) / room):
            method = _read(path, room, results)
            found[method.name] = method
    return found


def method_files(room: Path) -> list[Path]:
    """The files of a room's methods, in the order of their names; of a package its `__init__.py`."""
    files = [*room.glob("[!_]*.py"), *room.glob("*/__init__.py")]
    return sorted((path for path in files if "\nSource: " in path.read_text(encoding="utf-8")), key=method_name)


def method_name(path: Path) -> str:
    """The name of the method that a file or a package's `__init__.py` holds, with dashes."""
    stem = path.parent.name if path.stem == "__init__" else path.stem
    return stem.replace("_", "-")


def recipe_files() -> dict[str, Path]:
    """The reproductions by method, found by their place, in the order of their names."""
    (package,) = import_module("stemma").__path__
    return {method_name(path): path for path in sorted((Path(package) / "recipes").glob("[!_]*.py"))}


def outcome(method: Method) -> str:
    """What became of the paper's claims, in a few words."""
    if not method.rows:
        reason = method.unreproduced_because
        return f"no reproduction: {reason}" if reason else "not measured here"
    found = _counted(method.claims)
    real = f"; on a pretrained model: {_counted(method.real_claims)}" if method.real_claims else ""
    return f"the paper's claims: {found}{real}" if found else "measured, but no claim was tested"


def _counted(claims: list[Mapping[str, Any]]) -> str:
    counts = Counter(map(verdict, claims))
    return ", ".join(f"{name} {counts[name]}" for name in _VERDICTS if counts[name])


def measured(method: Method) -> str:
    """When, on what and with which commit; for a method with rows."""
    first = method.rows[0]
    commit = first["commit"][:7] + ("+" if first["dirty"] else "")
    threads = "one thread" if first["threads"] == 1 else f"{first['threads']} threads"
    return f"{first['date']}, {first['machine']['cpu']}, {threads}, commit {commit}"


def main(config: Config) -> dict[str, Any]:
    """Print all methods, or one; the result holds every claim and row."""
    known = methods()
    if config.method is None:
        for room, heading in ROOMS.items():
            members = [method for method in known.values() if method.room == room]
            if members:
                print("\n\n".join([heading, *map(_short, members)]), end="\n\n")
        return {"methods": {name: _plain(method) for name, method in known.items()}}
    if config.method not in known:
        near = difflib.get_close_matches(config.method.replace("_", "-"), known, n=1, cutoff=0.4)
        hint = f" Did you mean `stemma methods {near[0]}`?" if near else ""
        print(
            f"stemma methods: no method '{config.method}'.{hint}\nRun `stemma methods` for the list.", file=sys.stderr
        )
        return {"error": f"unknown method '{config.method}'", "exit_status": 2}
    method = known[config.method]
    print(_short(method))
    if method.reproduced:
        print(f"  measure again: stemma run {method.name}")
    if method.rows:
        about = notes(method.name.replace("-", "_"), method.rows)
        print("", *map(textwrap.fill, about), *tables(method.rows, method.rows[0]["shapes"]), sep="\n\n")
    if method.real_rows:
        print("", "On a pretrained model:", *tables(method.real_rows, method.real_rows[0]["shapes"]), sep="\n\n")
    return _plain(method)


def _results(package: Path) -> Path:
    for folder in (package / "_results", package.parents[1] / "benchmarks" / "results"):
        if folder.is_dir():
            return folder
    raise InvalidDataError(
        f"neither {package / '_results'} nor benchmarks/results of a checkout is there, so it is unknown what was "
        "measured; install Stemma again"
    )


def _read(path: Path, room: str, results: Path) -> Method:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    name = method_name(path)
    source = _SOURCE.search(" ".join(docstring.split()))
    if source is None:
        raise InvalidDataError(
            f"the docstring of {path} names no source; write a paragraph that begins with "
            'Source: "Title", 2025, arXiv 2501.01234'
        )
    reason = _NO_RUN.search(docstring)
    file = f"{room}_{name}.jsonl"
    return Method(
        name=name,
        room=room,
        purpose=docstring.partition("\n")[0],
        paper=Paper(source[1], int(source[2]), source[3]),
        reproduced=name in recipe_files(),
        unreproduced_because=" ".join(reason[1].split()) if reason else None,
        rows=_rows(results / file, name),
        real_rows=_rows(results / "real" / file, name),
    )


def _rows(file: Path, name: str) -> tuple[Mapping[str, Any], ...]:
    """The measurements of a method; none where there is no file.

    Raises:
        InvalidDataError: a line that is no row of this method.
    """
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), start=1):
        try:
            row = json.loads(line)
            fits = row["recipe"] == name and row.keys() >= _FIELDS
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise InvalidDataError(
                f"{file}, line {number}: no measurement of {name}; restore the file, or measure again with "
                f"`python benchmarks/recipes.py {name}`"
            )
        rows.append(row)
    return tuple(rows)


def _short(method: Method) -> str:
    paper = method.paper
    lines = [
        f"  {method.name}",
        f"    {method.purpose}",
        f"    {paper.title}, {paper.year}, arXiv {paper.arxiv}",
        f"    {outcome(method)}",
    ]
    if method.rows:
        lines.append(f"    measured {measured(method)}")
    return "\n".join(lines)


def _plain(method: Method) -> dict[str, Any]:
    """Plain data: of each run what its rows have in common once, then the rows."""
    own, real = _of_run(method.rows), _of_run(method.real_rows)
    described = {key: value for key, value in asdict(method).items() if key != "real_rows"}
    return {**described, **own, "real": real}


def _of_run(measured: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    common = ("recipe", "title", "shapes", "threads", "machine", "versions", "commit", "dirty", "date")
    rows = [{key: value for key, value in row.items() if key not in common} for row in measured]
    run = {key: measured[0][key] for key in common[1:]} if rows else None
    return {"run": run, "claims": [{**row, "verdict": verdict(row)} for row in rows if row["claim"]], "rows": rows}
