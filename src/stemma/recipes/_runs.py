"""What laptop-scale reproductions share: their options and finished runs on disk. Imports no torch.

A method that has a reproduction ends with `run(options)`, which `stemma run METHOD` finds by its place. It trains a
baseline and the method from the same start with the same seeds and budget, keeps every finished run, and returns the
report of `stemma.recipes._report`.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemma.errors import InvalidDataError
from stemma.files import replacing, write_json

__all__ = ["Options", "Runs", "fingerprint", "kept_folder"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every reproduction has."""

    seeds: int | None = None
    """Seeds of every method compared, 1 or more; None: as many as the reproduction needs."""
    output_dir: Path = Path("runs/recipes")
    """Folder of the report, its plot and the finished runs. A finished run is not repeated."""
    cache_dir: Path = Path(".cache/stemma")
    """Folder of the policies that training starts from; they are made once, in a few minutes."""
    model: str | None = None
    """A pretrained causal language model, folder or hub id, to measure on in place of the one that is made here, in a
    folder of its own name in `output_dir`."""
    quick: bool = False
    """Check in less than a minute that everything runs, in a folder `quick` of `output_dir`; its numbers mean
    nothing."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, or None; got {self.seeds}")

    @property
    def folder(self) -> Path:
        """Where report and runs go."""
        folder = self.output_dir if self.model is None else self.output_dir / Path(self.model).resolve().name
        return folder / "quick" if self.quick else folder


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
