"""What laptop-scale reproductions share: their options, finished runs on disk, statistics over seeds. Imports no torch.

A method that has a reproduction ends with `run(options)`, which `stemma run METHOD` finds by its place. It trains a
baseline and the method from the same start with the same seeds and budget, keeps every finished run, and returns the
report of `stemma.recipes._report`.
"""

import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from stemma.errors import InvalidDataError
from stemma.files import replacing, write_json

__all__ = [
    "Difference",
    "Options",
    "Runs",
    "area",
    "fingerprint",
    "kept_folder",
    "mean_and_error",
    "paired",
    "tail_probability",
]

_MOST_EXACT_SIGNS = 16  # of more pairs, the signs of the sign-flip test are drawn


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every reproduction has."""

    seeds: int | None = None
    """Seeds of every method compared, 1 or more; None: as many as the reproduction needs."""
    output_dir: Path = Path("runs/recipes")
    """Folder of the report, its plot and the finished runs. A finished run is not repeated."""
    cache_dir: Path = Path(".cache/stemma")
    """Folder of the policies that training starts from; they are made once, in a few minutes."""
    quick: bool = False
    """Check in less than a minute that everything runs, in a folder `quick` of `output_dir`; its numbers mean
    nothing."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, or None; got {self.seeds}")

    @property
    def folder(self) -> Path:
        """Where report and runs go."""
        return self.output_dir / "quick" if self.quick else self.output_dir


class Runs:
    """Finished runs in a folder, one JSON file each, named by method, seed and a hash of the settings.

    Args:
        folder: where the files are; made at once, so that a place that cannot be written to is known before any work.
        say: prints one line of progress; standard error when None.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))

    def __call__(
        self, method: str, seed: int, settings: Mapping[str, Any], function: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The result of `function`, from its file if this run is finished already.

        Args:
            method: name of the method, for the file and the report.
            seed: the run's seed.
            settings: everything else that the result depends on, as plain data.
            function: trains and returns plain JSON data.

        Raises:
            InvalidDataError: the file is not what a finished run leaves.
        """
        name = re.sub(r"[^A-Za-z0-9]+", "-", method)
        path = self.folder / f"{name}-{seed}-{fingerprint(settings)}.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InvalidDataError(f"{path} is no JSON ({error}); remove it, and the run is made again") from error
            if not isinstance(found, dict) or (found.get("method"), found.get("seed")) != (method, seed):
                raise InvalidDataError(
                    f"{path} is not what a finished run leaves; remove it, and the run is made again"
                )
            self.say(f"{method}, seed {seed}: finished before, read from {path.name}")
            return found
        started, cpu = time.perf_counter(), time.process_time()
        result = {"method": method, "seed": seed, "settings": dict(settings), **function()}
        result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        write_json(path, result)
        return result


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any of the settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def kept_folder(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, which `make` fills under a temporary name where it is missing: whole or not there at all.

    Of processes that make the same folder at once, the first to finish wins.
    """
    if not folder.exists():
        with replacing(folder, overwrite=False) as temporary:
            make(temporary)
    return folder


@dataclass(frozen=True)
class Difference:
    """How much higher the first of two methods is, over pairs with a common seed."""

    mean: float
    error: float
    """Standard error of the mean; NaN for one pair."""
    pairs: int
    p_value: float
    """One-sided sign-flip test: how often a mean as high or higher comes up when the sign of every pair's difference is
    a coin's. With n pairs it cannot be lower than 2 ** -n. NaN where a difference is not finite."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (unbiased; NaN for one value, and where a value is infinite)."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """First minus second, values of equal index belonging together.

    Up to 16 pairs, all signs are tried; of more, 65,536 draws of them.

    Raises:
        ValueError: the lengths differ, or there is no pair.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need two equally long lists of at least one value; got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, error = mean_and_error(differences)
    if not math.isfinite(mean):
        return Difference(mean, error, len(differences), math.nan)
    all_signs: Iterable[Sequence[int]] = itertools.product((1, -1), repeat=len(differences))
    if len(differences) > _MOST_EXACT_SIGNS:
        random = Random(0)
        drawn = (random.choices((1, -1), k=len(differences)) for _ in range(2**_MOST_EXACT_SIGNS - 1))
        all_signs = itertools.chain([[1] * len(differences)], drawn)  # those that were measured among them
    flipped = [
        sum(sign * difference for sign, difference in zip(signs, differences, strict=True)) for signs in all_signs
    ]
    as_high = sum(total >= sum(differences) - 1e-12 for total in flipped)
    return Difference(mean, error, len(differences), as_high / len(flipped))


def area(points: Sequence[tuple[float, float]], end: float) -> float:
    """Mean height over [0, end] of the polyline through the points; level before the first and behind the last.

    Args:
        points: (x, y) with ascending x, at least one.
        end: above 0.
    """
    xs, ys = [0.0, *(x for x, _ in points), math.inf], [points[0][1], *(y for _, y in points), points[-1][1]]
    total = 0.0
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(xs), itertools.pairwise(ys), strict=True):
        if x0 < end and x1 > x0:
            stop = min(x1, end)
            height = y1 if math.isinf(x1) else y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
            total += (stop - x0) * (y0 + height) / 2
    return total / end


def tail_probability(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) for X binomial: the one-sided test of a success rate above `probability`."""
    if probability in (0.0, 1.0):
        return float(successes == 0 or probability == 1.0)

    def log_chance(k: int) -> float:  # in logarithms, because binomial coefficients soon exceed a float
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return ways + k * math.log(probability) + (trials - k) * math.log1p(-probability)

    return min(1.0, math.fsum(math.exp(log_chance(k)) for k in range(successes, trials + 1)))
