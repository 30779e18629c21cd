"""What every index of a corpus offers, and what it finds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stemma.errors import InvalidDataError
from stemma.search.corpus import Corpus
from stemma.search.runs import Run

__all__ = ["Hit", "Index", "check_request"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found."""

    id: str
    score: float
    """Larger is better; scores of different queries cannot be compared."""
    parts: Mapping[str, float]
    """What each index contributed; the sum is the score."""
    matched: tuple[str, ...]
    """Words of the text, or terms that stand for it, that the query met."""
    text: str
    metadata: Mapping[str, Any]


class Index:
    """Finds documents of a corpus. A subclass defines `ranked`, and `matched` where words can explain a hit.

    Attributes:
        corpus: the documents.
        name: of this index among others over the same corpus.
    """

    corpus: Corpus
    name: str

    def ranked(self, query: str, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """The ids of the `k` best documents with their scores, best first, equal scores in the order of ids.

        Args:
            query: any text; no character of it has a meaning of its own.
            k: how many, at most.
            within: ids of the documents that may be found; None for all.

        Raises:
            InvalidDataError: the query is blank, or the index does not fit the corpus.
            ValueError: `k` is below 1.
        """
        raise NotImplementedError

    def matched(self, query: str, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The words that `Hit.matched` shows, by id."""
        return {}

    def search(self, query: str, k: int = 10, within: Collection[str] | None = None) -> list[Hit]:
        """The `k` best documents, see `ranked`."""
        return self._hits(query, {name: {self.name: score} for name, score in self.ranked(query, k, within).items()})

    def run(self, queries: Mapping[str, str], k: int = 1000) -> Run:
        """The `k` best documents of every query, for `evaluate` and `write_run`: {query id: {document id: score}}."""
        return {name: self.ranked(query, k) for name, query in queries.items()}

    def _hits(self, query: str, parts: Mapping[str, Mapping[str, float]]) -> list[Hit]:
        documents = self.corpus.documents(parts)
        matched = self.matched(query, list(documents))
        return [
            Hit(name, sum(parts[name].values()), parts[name], matched.get(name, ()), document.text, document.metadata)
            for name, document in documents.items()
        ]


def check_request(query: str, k: int) -> None:
    """Refuse what no index can answer; see `Index.ranked`."""
    if not query.strip():
        raise InvalidDataError("the query is empty; write at least one word")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
