"""The report of a reproduction: measurements, the tables made from them and the plot of its curves.

Measurements are plain data, so that a documentation page can be made from stored ones later.
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stemma.files import write_json, write_text
from stemma.recipes._statistics import area, mean_and_error, sign_flip
from stemma.recipes._tables import COLUMNS, COUNTS, notes, tables
from stemma.train.report import require_matplotlib, save_figure

__all__ = ["Measurement", "Report"]

Run = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number."""

    method: str
    metric: str
    """A key of the methods' table (pass@1, area, ...), or what is measured, in words."""
    value: float
    unit: str = ""
    error: float | None = None
    """Standard error of the value; over seeds where there are several."""
    repeats: int = 1
    """Seeds, or samples where there is one run."""
    baseline: str | None = None
    """The method that `value` is a difference to."""
    baseline_value: float | None = None
    claim: str | None = None
    """What the paper says about it."""
    threshold: float = 0.0
    """With a claim: what `value` is claimed to be above."""
    test: str | None = None
    """With a claim: "sign-flip" over `values`, "binomial" over `repeats` trials, or "count": no test is needed."""
    p_value: float | None = None
    """One-sided p-value of the test."""
    values: Sequence[float] | None = None
    """With a sign-flip test: what was tested, one number a seed."""


class Report:
    """Collects the runs of the methods of one reproduction and writes `<name>.json`, `<name>.md` and `<name>.png`.

    Args:
        name: the method's name.
        title: heading.
        about: facts of the setting, as shown.
        budget: sampled tokens over which the area under a curve is taken; None: it is not.

    Raises:
        MissingExtraError: matplotlib is not there, which the plot in the end would need.
    """

    caption = "pass@1 against tokens; the band is one standard error to either side of the mean over seeds"
    """What the plot shows."""
    size = (10.0, 4.4)
    """Width and height of the plot in inches."""

    def __init__(self, name: str, title: str, about: Mapping[str, Any], budget: float | None = None) -> None:
        require_matplotlib()
        self.name, self.title, self.about, self.budget = name, title, dict(about), budget
        self.runs: dict[str, list[Run]] = {}
        self.measurements: list[Measurement] = []

    def add(self, run: Run) -> None:
        """A finished run; those of one method are its seeds."""
        self.runs.setdefault(run["method"], []).append(run)

    def finals(self, method: str) -> list[float]:
        """Final pass@1 of each seed."""
        return [run["final"]["pass@1"] for run in self.runs[method]]

    def areas(self, method: str) -> list[float]:
        """Area under each seed's curve of pass@1 against sampled tokens, over [0, budget], divided by the budget."""
        curves = [[(point["sampled"], point["pass@1"]) for point in run["curve"]] for run in self.runs[method]]
        return [area(curve, self.budget) for curve in curves] if self.budget is not None else []

    def record(self, method: str, metric: str, value: float, **others: Any) -> None:
        """Add one measurement; `others` are fields of `Measurement`."""
        self.measurements.append(Measurement(method=method, metric=metric, value=value, **others))

    def mean(self, method: str, metric: str, values: Sequence[float], /, **others: Any) -> None:
        """Add the mean of a value over seeds; nothing where there is none."""
        if values:
            mean, error = mean_and_error(values)
            self.record(method, metric, mean, error=error, repeats=len(values), **others)

    def mean_of(self, method: str, metric: str, words: str, unit: str = "") -> None:
        """Add the mean over seeds of a metric that the trainer logged, itself the mean over steps."""
        known = [run["per_step"][metric] for run in self.runs[method] if metric in run["per_step"]]
        self.mean(method, words, known, unit=unit)

    def claim(
        self,
        method: str,
        metric: str,
        values: Sequence[float],
        claim: str,
        *,
        than: tuple[str, Sequence[float]] | None = None,
        threshold: float = 0.0,
        unit: str = "",
    ) -> None:
        """Add the sign-flip test of a claim; nothing where there is no value.

        Args:
            values: one a seed.
            than: a baseline and its values with the same seeds; the claim is then about the differences to them.
            threshold: what the mean is claimed to be above.
        """
        others: dict[str, Any] = {}
        if than is not None:
            others = {"baseline": than[0], "baseline_value": mean_and_error(than[1])[0] if than[1] else math.nan}
            values = [own - other for own, other in zip(values, than[1], strict=True)]
        if values:
            others |= {"test": "sign-flip", "p_value": sign_flip(values, threshold), "values": list(values)}
            self.mean(method, metric, values, unit=unit, claim=claim, threshold=threshold, **others)

    def compare(self, method: str, baseline: str, metric: str, claim: str) -> None:
        """Test on pairs of runs with one seed that a metric ("pass@1" or "area") is above that of a baseline."""
        values = {"pass@1": self.finals, "area": self.areas}[metric]
        own, other = (
            {run["seed"]: value for run, value in zip(self.runs[each], values(each))} for each in (method, baseline)
        )
        seeds = [seed for seed in own if seed in other]
        name = f"{COLUMNS[metric]}, {method} − {baseline}"
        self.claim(method, name, [own[s] for s in seeds], claim, than=(baseline, [other[s] for s in seeds]))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the three files.

        Returns:
            What the JSON file holds: `recipe`, `title`, `about`, `date`, `measurements` (each a plain `Measurement`),
            `curves` (per method and seed) and `files` (their paths).
        """
        measurements = [*self._of_methods(), *self.measurements]
        rows = [_finite(asdict(measurement)) for measurement in measurements]
        folder.mkdir(parents=True, exist_ok=True)
        self._draw(folder / f"{self.name}.png")
        result = {
            "recipe": self.name,
            "title": self.title,
            "about": self.about,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "measurements": rows,
            "curves": {method: [run["curve"] for run in runs] for method, runs in self.runs.items()},
            "files": {kind: str(folder / f"{self.name}.{kind}") for kind in ("json", "md", "png")},
        }
        write_json(folder / f"{self.name}.json", result)
        parts = [f"# {self.title}", *notes(self.name.replace("-", "_"), rows), f"![{self.caption}]({self.name}.png)"]
        write_text(folder / f"{self.name}.md", "\n\n".join([*parts, *tables(rows, self.about)]) + "\n")
        return result

    def _of_methods(self) -> list[Measurement]:
        found = []
        for method, runs in self.runs.items():
            steps = [run["per_step"] for run in runs]
            columns: dict[str, list[float]] = {
                "pass@1": self.finals(method),
                "area": self.areas(method),
                "sampled": [run["curve"][-1]["sampled"] for run in runs],
                "optimised": [run["curve"][-1]["optimised"] for run in runs],
                "encoded": [step.get("tokens/forwarded", math.nan) for step in steps],
                "encoded_without_sharing": [step.get("tokens/without_sharing", math.nan) for step in steps],
                "sampling_encoded": [step.get("tokens/rollout_encoded", math.nan) for step in steps],
                "sampling_without_sharing": [step.get("tokens/rollout_without_sharing", math.nan) for step in steps],
                "step_seconds": [step.get("time/step", math.nan) for step in steps],
                "update_seconds": [step.get("compare/time_shared", math.nan) for step in steps],
                "update_seconds_plain": [step.get("compare/time_plain", math.nan) for step in steps],
                "gradient_error": [step.get("compare/gradient_error", math.nan) for step in steps],
            }
            for metric, values in columns.items():
                known = [value for value in values if not math.isnan(value)]
                if known:
                    mean, error = mean_and_error(known)
                    value = max(known) if metric == "gradient_error" else mean
                    unit = "s" if "seconds" in metric else "tokens" if metric in COUNTS else ""
                    found.append(
                        Measurement(
                            method=method, metric=metric, value=value, error=error, repeats=len(known), unit=unit
                        )
                    )
        return found

    def _draw(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.plot(figure)
        save_figure(figure, path)

    def plot(self, figure: Any) -> None:
        """Draw into a matplotlib figure: mean and standard error over seeds of pass@1 against sampled and against
        optimised tokens."""
        axes = figure.subplots(1, 2, sharey=True)
        for axis, x in zip(axes, ("sampled", "optimised"), strict=True):
            for index, (method, runs) in enumerate(self.runs.items()):
                points = [[run["curve"][i] for run in runs] for i in range(min(len(run["curve"]) for run in runs))]
                xs = [mean_and_error([p[x] for p in point])[0] / 1000 for point in points]
                means, errors = zip(*(mean_and_error([p["pass@1"] for p in point]) for point in points), strict=True)
                # A method without a curve is one point, which the beginning of another's curve must not cover.
                style = {"marker": "o", "markersize": 3} if len(points) > 1 else {"marker": "D", "zorder": 5}
                axis.plot(xs, means, color=f"C{index}", label=method, **style)
                if len(runs) > 1:
                    low, high = ([m + s * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
                    axis.fill_between(xs, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
            axis.set_xlabel(f"{x} tokens (thousands)")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("pass@1 without prefix, held-out problems")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        bands = any(len(runs) > 1 for runs in self.runs.values())
        about = "\nmeans over seeds; a band is one standard error to either side" if bands else ""
        figure.suptitle(f"{self.title}{about}", fontsize=10)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: known(value) for key, value in row.items()}
