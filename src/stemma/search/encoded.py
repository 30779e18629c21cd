"""What indexes of encoded texts share: a store of rows that follows a corpus, and one way to call any encoder."""

import threading
from collections.abc import Callable, Collection, Sequence
from os import PathLike
from typing import Any

import numpy as np

from stemma.errors import InvalidDataError, MissingExtraError
from stemma.search.corpus import Corpus
from stemma.search.index import Index
from stemma.search.store import Array, Store

__all__ = ["Encoded", "encoded_by", "load_encoder"]

_CHUNK = 512
"""Texts that are encoded and stored at a time: what an interrupted build loses at most."""
_TOLERANCE = 1e-2
"""How far a row may be from what the encoder gives for its text, relative to its length: rounding in bfloat16 stays
below, other weights do not."""


def load_encoder(encoder: Any, kind: str) -> Any:
    """An encoder itself, or the sentence-transformers model of class `kind` in a folder or with a hub id.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        InvalidDataError: it cannot load the model.
    """
    if not isinstance(encoder, str | PathLike):
        return encoder
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "search", f"the encoder '{encoder}'") from error
    try:
        return getattr(sentence_transformers, kind)(str(encoder), model_kwargs={"use_safetensors": True})  # no pickle
    except (OSError, ValueError) as error:
        raise InvalidDataError(f"cannot load the encoder '{encoder}': {error}") from error


class Encoded(Index):
    """An index of rows that an encoder makes from texts, in the order of the texts' numbers, which the store's array
    `numbers` holds. Rows of texts that are gone stay in the files and are never found.
    """

    def __init__(self, corpus: Corpus, encoder: Any, name: str, follow: bool) -> None:
        self.corpus, self.encoder, self.name, self.follow = corpus, encoder, name, follow
        self.folder = corpus.path.with_name(f"{corpus.path.name}.{name}")
        self._store: Store | None = Store(self.folder) if self.folder.exists() else None
        self._revision = -1
        self._lock = threading.Lock()
        if follow:
            self.update()

    def update(self) -> int:
        """Encode the texts that the corpus has and the index lacks; returns how many.

        Every 512 texts are kept for good: a build that was interrupted goes on from there.

        Raises:
            InvalidDataError: the index belongs to another corpus or encoder, or the encoder gives what it should not.
            OutputError: another process is updating the index.
        """
        with self._lock:
            return self._update(self.corpus.revision)

    def _update(self, revision: int) -> int:
        self._reopen()
        encoded = 0
        while chunk := self.corpus.texts(self._last_number, _CHUNK):
            arrays = self._encode([text for _, text in chunk], [number for number, _ in chunk])
            if self._store is None:
                self._store = self._open(arrays)
            self._store.append(**arrays, numbers=[number for number, _ in chunk])
            encoded += len(chunk)
        self._look(revision)
        return encoded

    # ------------------------------------------------------------------------------------------ for the two indexes

    def _encode(self, texts: Sequence[str], numbers: Sequence[int]) -> dict[str, Array]:
        """The rows of some texts, as the store's arrays but for `numbers`."""
        raise NotImplementedError

    def _open(self, arrays: dict[str, Array]) -> Store:
        """The store for rows like these; refused when there is one for others."""
        raise NotImplementedError

    def _differs(self, row: int, arrays: dict[str, Array]) -> float:
        """How far a row of the store is from the only row of `arrays`, relative to its length."""
        raise NotImplementedError

    def _current(self) -> Store | None:
        """The store, up to date with the corpus; None when both are empty."""
        with self._lock:
            revision = self.corpus.revision
            if self._revision == revision:
                return self._store
            if self.follow:
                self._update(revision)
                return self._store
            self._reopen()
            if lacking := len(self.corpus.texts(self._last_number, _CHUNK)):
                more = " or more" if lacking == _CHUNK else ""
                raise InvalidDataError(
                    f"{self.folder} lacks {lacking}{more} texts of {self.corpus.path}; call update(), or `stemma index`"
                )
            self._look(revision)
            return self._store

    def _allowed(self, within: Collection[str] | None) -> Array:
        """Which rows may be found, bool."""
        if within is None:
            return self._alive
        names = set(within)
        return self._alive & np.fromiter((name in names for name in self._ids), bool, len(self._ids))

    def _rows_of(self, ids: Collection[str]) -> list[int]:
        """The row of each document.

        Raises:
            InvalidDataError: the index does not hold one of them.
        """
        self._current()
        lacking = [name for name in ids if name not in self._row]
        if lacking:
            raise InvalidDataError(f"{self.folder} does not hold the document '{lacking[0]}'")
        return [self._row[name] for name in ids]

    @property
    def _last_number(self) -> int:
        return int(self._store["numbers"][-1]) if self._store is not None and self._store.rows["numbers"] else 0

    def _look(self, revision: int) -> None:
        """Note which documents the rows stand for; of a later revision, there may be more."""
        self._revision = revision
        names = self.corpus.numbers()
        numbers = [] if self._store is None else self._store["numbers"].tolist()
        self._ids = [names.get(number, "") for number in numbers]
        self._alive = np.fromiter((number in names for number in numbers), bool, len(numbers))
        self._row = {names[number]: row for row, number in enumerate(numbers) if number in names}

    def _reopen(self) -> None:
        """Open the store, to which another process may have added; the first time, compare what the encoder gives for
        its oldest and its newest text."""
        if self.folder.exists():
            self._store = Store(self.folder)
        if self._store is None or self._revision >= 0:
            return
        if self._store.about.get("corpus") != self.corpus.id or self._last_number > self.corpus.last_number:
            raise InvalidDataError(
                f"{self.folder} is not of this {self.corpus.path}; remove the folder to make it again"
            )
        rows = {number: row for row, number in enumerate(self._store["numbers"].tolist())}
        held = [number for number in self.corpus.numbers() if number in rows]
        for number in {*held[:1], *held[-1:]}:
            ((_, text),) = self.corpus.texts(number - 1, 1)
            arrays = self._encode([text], [number])
            self._open(arrays)
            if not self._differs(rows[number], arrays) <= _TOLERANCE:
                raise InvalidDataError(
                    f"{self.folder} was made by another encoder; use that one, or remove the folder to make it again"
                )


def encoded_by(encoder: Any, kind: str) -> Callable[..., Any]:
    """The function that encodes texts of a kind, "query" or "document", for encoders that tell them apart."""
    return getattr(encoder, f"encode_{kind}", None) or getattr(encoder, "encode", None) or encoder
