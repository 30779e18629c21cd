"""The report of `stemma run kvcomm`: divergences of prompts, times by length, and the claims."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stemma.recipes._report import Report
from stemma.recipes._runs import mean_and_error, paired
from stemma.train.report import require_matplotlib, save_figure

__all__ = [
    "ALIGNED",
    "BLEND",
    "BOTH",
    "MEAN",
    "ONE",
    "OURS",
    "PUBLISHED",
    "UNMOVED",
    "WAYS",
    "WRONG",
    "KVCommReport",
]

UNMOVED, ALIGNED, OURS, MEAN = "no re-positioning", "re-aligned, no offsets", "KVCOMM", "mean of all offsets"
WRONG, ONE, BLEND, BOTH = "another agent's offsets", "one anchor", "CacheBlend-like", "KVCOMM and CacheBlend"
WAYS = (UNMOVED, ALIGNED, OURS, MEAN, WRONG, ONE, BLEND, BOTH)
PUBLISHED = "published rule"
_TIMED = {
    "reuse": "texts known",
    "blend": "texts known, 15% computed anew",
    "alone": "question and chunk new",
}


class KVCommReport(Report):
    """The report of prefills compared, and of times by length."""

    caption = "divergence from dense prefill by way of estimating, and time to the first token"

    def __init__(self, name: str, title: str, about: dict[str, Any], lengths: Sequence[int]) -> None:
        super().__init__(name, title, about)
        self.lengths = lengths
        self.streams: dict[str, list[dict[str, Any]]] = {}
        self.times: dict[int, list[dict[str, Any]]] = {}

    def values(self, way: str, column: int, rule: str = OURS) -> list[float]:
        """Means of each seed: divergence (column 0) or agreement (1)."""
        return [run["found"][way][column] for run in self.streams[rule] if way in run["found"]]

    def gains(self, length: int, how: str) -> list[float]:
        """Dense seconds over others, of each seed."""
        return [run["first_token"]["dense"] / run["first_token"][how] for run in self.times[length]]

    def summarise(self) -> None:
        """Reuse, divergences, times, and the claims."""
        for rule, runs in self.streams.items():
            for key, words in (
                ("reused", "share of prefills reused"),
                ("reused_later", "share of prefills reused, second half"),
                ("computed", "tokens run through the model, of those of dense prefills"),
            ):
                mean, error = mean_and_error([run[key] for run in runs])
                self.record(rule, words, mean, error=error, repeats=len(runs))
            self.record(rule, "prefills compared", sum(run["compared"] for run in runs), repeats=len(runs))
            pairs = zip(self.values(ALIGNED, 0, rule), self.values(OURS, 0, rule), strict=True)
            self._mean(rule, "divergence left, of that without offsets", [own / aligned for aligned, own in pairs])
        for way in WAYS:
            self._mean(
                way,
                "divergence from dense, all ways on the same prompts, 1/1000 nats",
                [1000 * v for v in self.values(way, 0)],
            )
            self._mean(way, "most likely byte agrees, all ways on the same prompts", self.values(way, 1))
        self._claims()
        signs = [sign for run in self.streams[OURS] for sign in run["signs"]]
        for column, words in enumerate(("entropy", "error of the second layer's keys")):
            if len(signs) > 2:
                value = _rank_correlation([s[column] for s in signs], [s[2] for s in signs])
                self.record(OURS, f"rank correlation of {words} with divergence", value, repeats=len(signs))
        for length in self.lengths:
            prompt = statistics.fmean(run["prompt"] for run in self.times[length])
            for how, words in _TIMED.items():
                name = f"first token, dense time over reused, chunk of {length} (prompt of {prompt:.0f})"
                self._mean(words, name, self.gains(length, how))

    def _mean(self, method: str, metric: str, values: Sequence[float]) -> None:
        if values:
            mean, error = mean_and_error(values)
            self.record(method, metric, mean, error=error, repeats=len(values))

    def _claims(self) -> None:
        reused = [run["reused"] - 0.7 for run in self.streams[PUBLISHED]]
        self._claim(PUBLISHED, "share of prefills reused, minus 0.7", reused, "more than 70% of prefills are reused")
        for other, claim in (
            (ALIGNED, "offsets bring reused states nearer to dense ones than re-positioning alone"),
            (MEAN, "anchors count by their likeness"),
            (WRONG, "each agent needs offsets of its own"),
        ):
            pairs = zip(self.values(other, 0), self.values(OURS, 0), strict=True)
            words = f"divergence, {other} − {OURS}, 1/1000 nats"
            self._claim(OURS, words, [1000 * (a - b) for a, b in pairs], claim)
        near, far = self.lengths[0], self.lengths[-1]
        grown = [b - a for a, b in zip(self.gains(near, "reuse"), self.gains(far, "reuse"), strict=True)]
        words = f"gain in time to the first token, chunk of {far} − chunk of {near}"
        self._claim(OURS, words, grown, "the first token comes sooner (up to 7.8 times), the longer the text the more")

    def _claim(self, method: str, metric: str, values: Sequence[float], claim: str) -> None:
        if values:
            test = paired(values, [0.0] * len(values))
            self.record(
                method,
                metric,
                test.mean,
                error=test.error,
                repeats=len(values),
                claim=claim,
                expected="higher",
                p_value=test.p_value,
            )

    def plot(self, path: Path) -> None:
        """Divergence by way of estimating; gain in time by length of the chunk."""
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        ways = [way for way in WAYS if self.values(way, 0)]
        means = [mean_and_error(self.values(way, 0)) for way in ways]
        left.barh(
            ways, [m for m, _ in means], xerr=[e for _, e in means], color=["C0" if w == OURS else "C7" for w in ways]
        )
        left.set(xscale="log", xlabel="divergence from dense prefill, nats")
        left.invert_yaxis()
        for how, label in _TIMED.items():
            gains = [mean_and_error(self.gains(length, how)) for length in self.lengths]
            right.errorbar(
                self.lengths, [m for m, _ in gains], yerr=[e for _, e in gains], marker="o", ms=3, label=label
            )
        right.axhline(1, color="k", lw=0.8)
        right.set(xscale="log", xlabel="bytes of the shared chunk", ylabel="dense time to first token over reused")
        right.set_xticks(self.lengths, [str(length) for length in self.lengths])
        right.minorticks_off()
        right.legend(fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.25)
        figure.suptitle(self.title, fontsize=10)
        save_figure(figure, path)


def _rank_correlation(some: Sequence[float], others: Sequence[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (some, others)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
