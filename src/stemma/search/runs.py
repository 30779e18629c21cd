"""Rankings as plain dictionaries: normalised, mixed, and read and written as TREC files.

`Scores` are one query's {document id: score}, a `Run` holds them by query id, and `Qrels` the judgements
{query id: {document id: grade}}; a grade above 0 is relevant.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from stemma.errors import InvalidDataError
from stemma.files import write_text

__all__ = [
    "Norm",
    "Qrels",
    "Run",
    "Scores",
    "Weights",
    "best",
    "best_rows",
    "fuse",
    "mix",
    "normalized",
    "read_qrels",
    "read_run",
    "write_run",
]

Scores = Mapping[str, float]
Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]
Weights = Literal["linear", "rrf"] | Sequence[float]
Norm = Literal["minmax", "zscore"]

_RRF = 60
"""The constant of reciprocal rank fusion, as in the paper that introduced it (Cormack et al., 2009)."""


def best(scores: Scores, k: int | None = None) -> dict[str, float]:
    """The `k` largest scores (None: all), largest first, equal ones in the order of ids."""
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k])


def best_rows(scores: Any, ids: Sequence[str], k: int, above: float = -math.inf) -> dict[str, float]:
    """`best` of an array: of its rows with a score beyond `above`, by the id of each row."""
    rows = (scores > above).nonzero()[0]
    if k < len(rows):
        held = scores[rows]  # without the many equal ones below `above`, on which a partition is slow
        held.partition(len(rows) - k)
        rows = rows[scores[rows] >= held[len(rows) - k]]
    return best({ids[row]: score for row, score in zip(rows.tolist(), scores[rows].tolist())}, k)


def normalized(scores: Scores, how: Norm = "minmax") -> dict[str, float]:
    """Scores of one list on a common scale.

    Args:
        scores: finite numbers.
        how: "minmax" maps the list's range to 0 to 1, "zscore" its mean to 0 and its standard deviation to 1. A list
            whose scores are all equal becomes all 1, or all 0.

    Raises:
        InvalidDataError: a score is not finite.
    """
    for name, score in scores.items():
        if not math.isfinite(score):
            raise InvalidDataError(f"the score of document '{name}' is {score}; scores must be finite")
    if not scores:
        return {}
    if how == "minmax":
        low, high = min(scores.values()), max(scores.values())
        return {name: (score - low) / (high - low) if high > low else 1.0 for name, score in scores.items()}
    if how != "zscore":
        raise ValueError(f"how must be 'minmax' or 'zscore', got {how!r}")
    mean = math.fsum(scores.values()) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores.values()) / len(scores))
    return {name: (score - mean) / deviation if deviation else 0.0 for name, score in scores.items()}


def mix(
    lists: Mapping[str, Scores], weights: Weights = "linear", normalize: Norm = "minmax", k: int | None = None
) -> dict[str, dict[str, float]]:
    """Mix several lists for one query: {document id: {list: contribution}}, best first; a score is the sum.

    Args:
        lists: scores by the name of what made them; a list that finds nothing contributes nothing.
        weights: "linear" adds normalised scores with equal weights, a sequence with these weights; a document that a
            list lacks counts as its last one. "rrf" adds 1 / (60 + rank) instead (reciprocal rank fusion).
        normalize: see `normalized`.
        k: how many documents, at most; None for all.

    Raises:
        ValueError: another number of weights than of lists.
        InvalidDataError: a score is not finite.
    """
    if weights == "rrf":
        ranks = {name: enumerate(best(scores), start=1) for name, scores in lists.items()}
        parts = {name: {document: 1 / (_RRF + rank) for rank, document in ranked} for name, ranked in ranks.items()}
        floor = dict.fromkeys(lists, 0.0)
    else:
        factors = [1 / len(lists)] * len(lists) if weights == "linear" else list(weights)
        if len(factors) != len(lists):
            raise ValueError(f"{len(factors)} weights for {len(lists)} lists; give one weight for each")
        parts = {
            name: {document: factor * score for document, score in normalized(scores, normalize).items()}
            for factor, (name, scores) in zip(factors, lists.items())
        }
        floor = {name: min(part.values(), default=0.0) for name, part in parts.items()}
    columns = [(part, floor[name]) for name, part in parts.items()]
    documents = {document for part in parts.values() for document in part}
    totals = {document: sum([part.get(document, low) for part, low in columns]) for document in documents}
    return {
        document: {name: part.get(document, floor[name]) for name, part in parts.items()}
        for document in best(totals, k)
    }


def fuse(runs: Sequence[Run], weights: Weights = "linear", normalize: Norm = "minmax", k: int = 1000) -> Run:
    """Mix runs query by query, see `mix`; of each query the `k` best are kept. A run without a query gives no list."""
    queries = dict.fromkeys(query for run in runs for query in run)
    fused = {}
    for query in queries:
        mixed = mix({str(number): run.get(query, {}) for number, run in enumerate(runs)}, weights, normalize, k)
        fused[query] = {document: sum(parts.values()) for document, parts in mixed.items()}
    return fused


# ---------------------------------------------------------------------------------------------- TREC files


def read_run(path: str | PathLike[str]) -> Run:
    """Read a TREC run: lines `query Q0 document rank score tag`. The scores decide, not the ranks.

    Raises:
        InvalidDataError: the file cannot be read or is empty, a line has another form, a document comes twice for a
            query; says which line.
    """
    run: Run = {}
    for where, (query, _, document, _, score, _) in _fields(path, 6, "query Q0 document rank score tag"):
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InvalidDataError(f"{where}: the score must be a finite number, got '{score}'")
        if document in run.setdefault(query, {}):
            raise InvalidDataError(f"{where}: document '{document}' comes twice for query '{query}'")
        run[query][document] = value
    return run


def write_run(path: str | PathLike[str], run: Run, tag: str = "stemma") -> None:
    """Write a TREC run; the file is whole or as it was.

    Raises:
        InvalidDataError: an id has white space or is empty, which the format cannot hold.
    """
    for name in (*run, *(document for scores in run.values() for document in scores), tag):
        if len(name.split()) != 1 or name != name.strip():
            raise InvalidDataError(f"the id {name!r} cannot stand in a TREC file; ids there have no white space")
    lines = [
        f"{query} Q0 {document} {rank} {score!r} {tag}\n"
        for query, scores in run.items()
        for rank, (document, score) in enumerate(best(scores).items(), start=1)
    ]
    write_text(path, "".join(lines))


def read_qrels(path: str | PathLike[str]) -> Qrels:
    """Read TREC judgements: lines `query iteration document grade`.

    Raises:
        InvalidDataError: the file cannot be read or is empty, a line has another form, a document has two grades for a
            query; says which line.
    """
    qrels: Qrels = {}
    for where, (query, _, document, grade) in _fields(path, 4, "query iteration document grade"):
        try:
            value = int(grade)
        except ValueError:
            raise InvalidDataError(f"{where}: the grade must be a whole number, got '{grade}'") from None
        if qrels.setdefault(query, {}).setdefault(document, value) != value:
            raise InvalidDataError(f"{where}: document '{document}' has two grades for query '{query}'")
    return qrels


def _fields(path: str | PathLike[str], count: int, form: str) -> Iterator[tuple[str, list[str]]]:
    """The fields of every line that is not blank, with the line's place."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidDataError(f"cannot read {path}: {reason}; expected lines '{form}'") from error
    if not any(line.strip() for line in lines):
        raise InvalidDataError(f"{path} is empty; expected lines '{form}'")
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields and len(fields) != count:
            raise InvalidDataError(f"{path}, line {number}: expected '{form}', got {line.strip()[:60]!r}")
        if fields:
            yield f"{path}, line {number}", fields
