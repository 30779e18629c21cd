"""Append-only arrays in a folder, and the nearest rows of one of them.

A store is a folder of raw arrays, each a file of rows one after the other, and a manifest that says what they are and
how many rows of each count. New rows are written behind those and count once the manifest is replaced: a process that
is killed while it appends leaves what was there.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemma.errors import InvalidDataError, OutputError
from stemma.files import locked, replacing, write_json

__all__ = ["Array", "Store", "nearest", "products"]

Array = npt.NDArray[Any]

_FORMAT = 1
_MANIFEST = "manifest.json"
_BLOCK_BYTES = 2**26
"""Of a block of rows in float32."""


class Store:
    """Arrays in a folder, memory-mapped; rows are added at their ends.

    ```python
    import numpy as np

    from stemma.search.store import Store, nearest

    store = Store.open("keys", {"keys": ("float32", (4,)), "values": ("int32", ())}, about={"model": "tiny"})
    store.append(keys=np.eye(4), values=[7, 8, 9, 7])
    scores, rows = nearest(store["keys"], np.array([[0.0, 0.1, 0.9, 0.0]]), k=2)
    print(store["values"][rows])
    # prints: [[9 8]]
    ```

    Attributes:
        folder: where the arrays are.
        about: what the rows are, as given when the store was made.
        columns: dtype and shape of one row, by the name of each array.
        rows: how many rows of each array count.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a store that is there.

        Raises:
            InvalidDataError: the folder has no manifest, or an array is shorter than the manifest says.
        """
        self.folder = Path(folder)
        held = self._manifest()
        self.about: dict[str, Any] = held["about"]
        self.columns = {name: (kind, tuple(shape)) for name, (kind, shape) in held["columns"].items()}
        self.rows: dict[str, int] = held["rows"]
        for name, count in self.rows.items():
            path = self._path(name)
            if not path.exists() or path.stat().st_size < count * self._row_bytes(name):
                raise InvalidDataError(f"{path} does not hold the {count:,} rows of its manifest; make the store again")

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        columns: Mapping[str, tuple[str, tuple[int, ...]]],
        about: Mapping[str, Any],
    ) -> "Store":
        """Open a store, or make an empty one where there is no folder.

        Args:
            folder: where the arrays are.
            columns: dtype and shape of one row, by the name of each array.
            about: JSON data on what the rows are, such as the model that made them.

        Raises:
            InvalidDataError: the store that is there has other columns, or is about something else.
        """
        folder = Path(folder)
        if not folder.exists():
            with replacing(folder, overwrite=False) as made:
                made.mkdir()
                for name in columns:
                    (made / f"{name}.bin").touch()
                held = {"format": _FORMAT, "about": about, "columns": columns, "rows": dict.fromkeys(columns, 0)}
                write_json(made / _MANIFEST, held)
        store = cls(folder)
        for was, now in ((store.about, dict(about)), (store.columns, dict(columns))):
            for name in {**was, **now}:
                if was.get(name) != now.get(name):
                    raise InvalidDataError(
                        f"{folder} was made with {name} = {was.get(name)}, now it is {now.get(name)}; "
                        "remove the folder to make it again"
                    )
        return store

    def __getitem__(self, name: str) -> Array:
        """The rows of an array, `(rows, *shape)`, read-only."""
        kind, shape = self.columns[name]
        if not self.rows[name]:
            return np.empty((0, *shape), kind)
        return np.memmap(self._path(name), kind, "r", shape=(self.rows[name], *shape))

    def append(self, **arrays: npt.ArrayLike) -> None:
        """Add rows to the ends of the arrays; they count when all of them are on the disk, or none does.

        Raises:
            InvalidDataError: an array is missing, has rows of another shape, or holds NaN or infinities.
            OutputError: another process writes the store, or has added rows since this one opened it.
        """
        if arrays.keys() != self.columns.keys():
            raise InvalidDataError(f"rows need the arrays {sorted(self.columns)}, got {sorted(arrays)}")
        made = {name: np.ascontiguousarray(array, self.columns[name][0]) for name, array in arrays.items()}
        for name, array in made.items():
            if array.shape[1:] != self.columns[name][1]:
                raise InvalidDataError(
                    f"a row of '{name}' has the shape {self.columns[name][1]}, got {array.shape[1:]}; use what made "
                    f"{self.folder}, or remove that folder"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InvalidDataError(f"'{name}' holds values that are not finite in {array.dtype}")
        with locked(self.folder):
            if self._manifest()["rows"] != self.rows:
                raise OutputError(f"another process has added rows to {self.folder}; open it again")
            for name, array in made.items():
                with self._path(name).open("r+b") as file:
                    file.truncate(self.rows[name] * self._row_bytes(name))  # what a killed process has left
                    file.seek(0, os.SEEK_END)
                    file.write(array.data)
                    file.flush()
                    os.fsync(file.fileno())
            rows = {name: count + len(made[name]) for name, count in self.rows.items()}
            held = {"format": _FORMAT, "about": self.about, "columns": self.columns, "rows": rows}
            write_json(self.folder / _MANIFEST, held)
        self.rows = rows

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / _MANIFEST
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidDataError(
                f"{self.folder} has no readable {_MANIFEST} ({error}); make the store again"
            ) from error
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise InvalidDataError(f"{path} is not of format {_FORMAT}, which this version reads; make the store again")
        return held

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _row_bytes(self, name: str) -> int:
        kind, shape = self.columns[name]
        return np.dtype(kind).itemsize * math.prod(shape)


def products(matrix: Array, queries: Array) -> Iterator[tuple[int, Array]]:
    """Inner products of all rows with some queries, block by block: the first row of a block, and `(queries, rows)`.

    Args:
        matrix: `(rows, dim)`, float32 or float16, best memory-mapped.
        queries: `(queries, dim)`.
    """
    step = max(1, _BLOCK_BYTES // (4 * max(1, matrix.shape[1])))
    for begin in range(0, len(matrix), step):
        yield begin, queries.astype(np.float32) @ matrix[begin : begin + step].astype(np.float32, copy=False).T


def nearest(matrix: Array, queries: Array, k: int) -> tuple[Array, Array]:
    """The rows with the largest inner products, exactly: `(scores, rows)`, both `(queries, min(k, rows))`, best first.

    Of equal products the lower row comes first. For distances, store `(x, -|x|²/2)` and ask with `(q, 1)`: the products
    are then `(|q|² - |x - q|²) / 2`.

    Args:
        matrix: `(rows, dim)`, float32 or float16.
        queries: `(queries, dim)`.
        k: rows per query, at most.
    """
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for begin, found in products(matrix, queries):
        scores = np.concatenate([scores, found], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(begin, begin + found.shape[1]), found.shape)], axis=1)
        kept = np.array([_top(each, k) for each in scores], np.int64).reshape(len(scores), min(k, scores.shape[1]))
        scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
    return scores, rows


def _top(scores: Array, k: int) -> Array:
    """Positions of the `k` largest, largest first, of equal ones the earlier first."""
    if k < len(scores):
        candidates = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
