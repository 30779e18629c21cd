"""Measures of rankings against judgements, as trec_eval and `ir-measures` define them, and paired tests between runs.

With the ranking d_1, d_2, ... of a query, g_i the grade of d_i (0 where it is negative or not judged), relevant those
with a grade of at least 1, and R their number:

    nDCG@k = Σ_{i≤k} g_i / log2(i + 1), over its value for the best possible ranking
    AP     = 1/R · Σ_{i: d_i relevant} P@i          P@k = relevant among the first k / k
    RR     = 1 / rank of the first relevant         R@k = relevant among the first k / R
    Bpref  = 1/R · Σ_{d relevant, found} (1 - min(judged not relevant above d, R) / min(R, N))

N is the number of documents judged 0. A measure without a cut-off takes the whole ranking. As in trec_eval, scores are
compared in float32 and equal ones ordered by falling id. A judged query that a run lacks counts 0, as does one without
relevant documents; queries of the run that are not judged are left out.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass
from operator import getitem

from stemma.errors import InvalidDataError
from stemma.search.runs import Qrels, Run, Scores

__all__ = ["MEASURES", "Comparison", "Evaluation", "compare", "evaluate", "measure"]

MEASURES = ("nDCG@10", "AP", "RR", "P@10", "R@100", "Bpref")
"""What `evaluate` computes unless told otherwise."""
_EXACT = 16
"""Queries up to which all sign patterns are tried: 2^16."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measures of one run."""

    values: Mapping[str, Mapping[str, float]]
    """Measure -> query -> value, for every judged query."""
    missing: tuple[str, ...]
    """Judged queries that the run lacks; they count 0."""
    unjudged: tuple[str, ...]
    """Queries of the run that have no judgements; they do not count."""

    @property
    def means(self) -> dict[str, float]:
        """Measure -> mean over the judged queries."""
        return {measure: math.fsum(values.values()) / len(values) for measure, values in self.values.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much better one run is than another on the same queries."""

    difference: float
    """Mean over the queries of the first run's value minus the second's."""
    p: float
    """Two-sided p-value of the paired permutation test."""
    queries: int


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES) -> Evaluation:
    """Compute measures of a run.

    Args:
        qrels: {query: {document: grade}}.
        run: {query: {document: score}}.
        measures: names of `ir-measures`: nDCG, AP, RR, P, R, Success, Bpref, with a cut-off such as nDCG@10 where they
            take one; MAP and MRR are other names of AP and RR.

    Raises:
        InvalidDataError: no query of the run is judged.
        ValueError: an unknown measure.

    ```python
    from stemma.search import evaluate

    print(evaluate({"q": {"a": 1}}, {"q": {"a": 0.5, "b": 0.7}}, ["RR", "P@1"]).means)
    # prints: {'RR': 0.5, 'P@1': 0.0}
    ```
    """
    functions = {name: measure(name) for name in measures}
    if not qrels.keys() & run.keys():
        raise InvalidDataError(
            f"no query of the run is judged: it has {sorted(run)[:3]}, the judgements {sorted(qrels)[:3]}; "
            "check that both number their queries alike"
        )
    values: dict[str, dict[str, float]] = {name: {} for name in measures}
    for query, grades in qrels.items():
        ranking = [grades.get(document) for document in _as_trec_eval(run.get(query, {}))]
        for name, function in functions.items():
            values[name][query] = function(ranking, list(grades.values()))
    return Evaluation(values, tuple(sorted(qrels.keys() - run.keys())), tuple(sorted(run.keys() - qrels.keys())))


def compare(first: Evaluation, second: Evaluation, measure: str, draws: int = 100_000, seed: int = 0) -> Comparison:
    """Test whether two runs differ on a measure: a paired permutation test over the queries.

    Under the hypothesis that it does not matter which run a value comes from, the signs of the differences are random.
    Up to 16 queries all patterns of signs are tried; above, `draws` random ones, and p is at least 1 / (draws + 1).

    Raises:
        InvalidDataError: the evaluations are of other queries, or lack the measure.
    """
    one, two = first.values.get(measure), second.values.get(measure)
    if one is None or two is None or one.keys() != two.keys():
        raise InvalidDataError(f"the evaluations do not hold {measure} for the same queries; use the same judgements")
    differences = [one[query] - two[query] for query in one]
    # Sums of eight signed differences by the byte that gives their signs: a draw is then one look-up for each eight.
    tables = []
    for begin in range(0, len(differences), 8):
        sums = [0.0]
        for difference in differences[begin : begin + 8]:
            sums = [total + sign * difference for sign in (1, -1) for total in sums]
        tables.append(sums * (256 // len(sums)))
    total = math.fsum(differences)
    bound = abs(total) - 1e-12 * max(1.0, math.fsum(map(abs, differences)))
    exact = len(differences) <= _EXACT
    if exact:
        patterns = (pattern.to_bytes(len(tables), "little") for pattern in range(2 ** len(differences)))
    else:
        generator = random.Random(seed)
        patterns = (generator.randbytes(len(tables)) for _ in range(draws))
    extreme = sum(abs(sum(map(getitem, tables, pattern))) >= bound for pattern in patterns)
    p = extreme / 2 ** len(differences) if exact else (extreme + 1) / (draws + 1)
    return Comparison(total / len(differences), p, len(differences))


def _as_trec_eval(scores: Scores) -> list[str]:
    """Documents by falling score in float32, equal ones by falling id."""
    return sorted(scores, key=lambda document: (c_float(scores[document]).value, document), reverse=True)


# ---------------------------------------------------------------------------------------------- the measures
#
# Each takes the grades of the ranked documents (None: not judged) and all grades of the query.

Grades = Sequence[int | None]
Measure = Callable[[Grades, Sequence[int]], float]


def measure(name: str) -> Measure:
    """The function that computes a measure; an unknown name is a ValueError."""
    match = re.fullmatch(r"([A-Za-z]+)(?:@([1-9]\d*))?", name)
    kind, cutoff = (match[1].lower(), match[2] and int(match[2])) if match else ("", None)
    if kind not in _FUNCTIONS or (kind in ("p", "r", "success") and not cutoff) or (kind == "bpref" and cutoff):
        raise ValueError(
            f"unknown measure '{name}'; known are nDCG, AP, RR, Bpref, and nDCG@k, AP@k, RR@k, P@k, R@k, Success@k"
        )
    return lambda ranking, grades: _FUNCTIONS[kind](ranking, grades, cutoff)


def _ranks(ranking: Grades) -> list[int]:
    """Ranks of the relevant documents."""
    return [rank for rank, grade in enumerate(ranking, start=1) if (grade or 0) > 0]


def _count(grades: Sequence[int]) -> int:
    """R, or 1 where nothing is relevant and every measure is 0."""
    return max(1, len(_ranks(grades)))


def _dcg(grades: Grades) -> float:
    return sum(max(grade or 0, 0) / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))


def _ndcg(ranking: Grades, grades: Sequence[int], cutoff: int | None) -> float:
    return _dcg(ranking[:cutoff]) / (_dcg(sorted(grades, reverse=True)[:cutoff]) or 1)


def _ap(ranking: Grades, grades: Sequence[int], cutoff: int | None) -> float:
    found = enumerate(_ranks(ranking[:cutoff]), start=1)
    return sum(number / rank for number, rank in found) / _count(grades)


def _rr(ranking: Grades, grades: Sequence[int], cutoff: int | None) -> float:
    return sum(1 / rank for rank in _ranks(ranking[:cutoff])[:1])


def _precision(ranking: Grades, grades: Sequence[int], cutoff: int) -> float:
    return len(_ranks(ranking[:cutoff])) / cutoff


def _recall(ranking: Grades, grades: Sequence[int], cutoff: int) -> float:
    return len(_ranks(ranking[:cutoff])) / _count(grades)


def _success(ranking: Grades, grades: Sequence[int], cutoff: int) -> float:
    return float(bool(_ranks(ranking[:cutoff])))


def _bpref(ranking: Grades, grades: Sequence[int], cutoff: None) -> float:
    relevant, not_relevant = _count(grades), grades.count(0)
    total, above = 0.0, 0
    for grade in ranking:
        if grade == 0:
            above += 1
        elif (grade or 0) > 0:
            total += 1 - min(above, relevant) / min(relevant, not_relevant) if above else 1
    return total / relevant


_FUNCTIONS: dict[str, Callable[..., float]] = {
    "ndcg": _ndcg,
    "ap": _ap,
    "map": _ap,
    "rr": _rr,
    "mrr": _rr,
    "p": _precision,
    "r": _recall,
    "success": _success,
    "bpref": _bpref,
}
