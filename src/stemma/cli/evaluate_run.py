"""Measure TREC runs against judgements, and test whether they differ from the first.

Measures are those of ir-measures: nDCG@10, AP (or MAP), RR (or MRR), P@5, R@100, Success@1, Bpref and so on. Each run
after the first is compared with it by a paired permutation test over the queries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma evaluate-run`."""

    qrels: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QRELS")]
    """Judgements, lines `query iteration document grade`."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Runs, lines `query Q0 document rank score tag`."""
    measures: tuple[str, ...] = ("nDCG@10", "AP", "RR", "P@10", "R@100", "Bpref")
    """What to measure."""
    seed: int = 0
    """Seed of the permutation test, which draws above 16 queries."""

    def __post_init__(self) -> None:
        from stemma.search.metrics import measure

        for name in self.measures:
            measure(name)
        if not self.runs:
            raise ValueError("give at least one run.")


def main(config: Config) -> dict[str, Any]:
    """Print a line for each run and return the figures."""
    from stemma.search import compare, evaluate, read_qrels, read_run

    qrels = read_qrels(config.qrels)
    evaluations = [evaluate(qrels, read_run(path), config.measures) for path in config.runs]
    width = max(len(str(path)) for path in config.runs)
    print(f"{'':{width}}  {'  '.join(f'{measure:>14}' for measure in config.measures)}")
    results = []
    for path, evaluation in zip(config.runs, evaluations):
        tests = {}
        if evaluation is not evaluations[0]:
            tests = {each: compare(evaluation, evaluations[0], each, seed=config.seed).p for each in config.measures}
        cells = [f"{mean:.4f}" + (f" p={tests[each]:.3f}" if tests else "") for each, mean in evaluation.means.items()]
        print(f"{path!s:{width}}  {'  '.join(f'{cell:>14}' for cell in cells)}")
        for what, queries in (("judged but not in the run", evaluation.missing), ("not judged", evaluation.unjudged)):
            if queries:
                print(f"{'':{width}}  {len(queries)} queries {what}, such as {queries[0]}")
        left = {"missing": evaluation.missing, "unjudged": evaluation.unjudged}
        results.append({"run": path, "means": evaluation.means, "p": tests, **left, "per_query": evaluation.values})
    return {"queries": len(qrels), "runs": results}
