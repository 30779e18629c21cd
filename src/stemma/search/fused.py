"""Several indexes as one: mixed scores, feedback from what was found first, reranking, and diversity.

Feedback (Rocchio, 1971; for vectors Li et al., 2021) takes the first documents of a search for relevant and moves the
query's vector towards theirs,

    q' = α q + β mean(d_1, ..., d_k),

and searches again. Lists can be mixed before it, so that the documents come from the mixed list; after it, so that the
second list is mixed with the others; or both, which ranks best over four classic collections (docs/search.md).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stemma.errors import InvalidDataError
from stemma.search.index import Hit, Index, check_request
from stemma.search.runs import Norm, Scores, Weights, best, mix, normalized

__all__ = ["Fused", "Reranked", "Rocchio", "mmr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rocchio:
    """How far a query moves towards the documents that it found first."""

    documents: int = 5
    """k: how many of the first documents count as relevant."""
    alpha: float = 0.4
    """Weight of the query."""
    beta: float = 0.6
    """Weight of the mean of the documents."""

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ValueError(f"documents must be at least 1, got {self.documents}")

    @classmethod
    def average(cls, documents: int = 3) -> "Rocchio":
        """The mean of the query and the documents, each counting once."""
        return cls(documents=documents, alpha=1 / (documents + 1), beta=documents / (documents + 1))


class Fused(Index):
    """Indexes of one corpus whose scores are mixed.

    Args:
        indexes: of the same corpus, each with another name.
        weights: "linear", "rrf" or one number for each index; see `stemma.search.runs.mix`.
        normalize: how scores of a list come to a common scale, "minmax" or "zscore".
        feedback: where lists are mixed around the feedback to the vector indexes: "before" it, "after" it, or "both";
            None for no feedback. The other indexes answer the query as it stands. With "before", the second lists of
            the vector indexes are the result.
        rocchio: how the feedback is weighted.
        depth: documents that each index hands in.
        name: of this index among others.

    Raises:
        ValueError: indexes of several corpora or with equal names, or feedback without a vector index.

    ```python
    from stemma.search import Corpus, Dense, Fused, Lexical

    corpus = Corpus.open("texts.sqlite")
    corpus.add([{"id": "a", "text": "aab ab"}, {"id": "b", "text": "bbb b"}])
    letters = Dense(corpus, lambda texts: [[text.count(letter) for letter in "ab"] for text in texts])
    (hit, *_) = Fused(Lexical(corpus), letters, feedback="both").search("ab")
    print(hit.id, dict(hit.parts), hit.matched)
    # prints: a {'lexical': 0.5, 'dense': 0.5} ('ab',)
    ```
    """

    def __init__(
        self,
        *indexes: Index,
        weights: Weights = "linear",
        normalize: Norm = "minmax",
        feedback: Literal["before", "after", "both"] | None = None,
        rocchio: Rocchio = Rocchio(),
        depth: int = 1000,
        name: str = "fused",
    ) -> None:
        if len({index.corpus.id for index in indexes}) != 1 or len({index.name for index in indexes}) != len(indexes):
            raise ValueError("indexes must be of one corpus, each with a name of its own (name=...)")
        if feedback not in (None, "before", "after", "both"):
            raise ValueError(f"feedback must be 'before', 'after', 'both' or None, got {feedback!r}")
        self._moving: list[Any] = [index for index in indexes if hasattr(index, "nearest")]
        if feedback and not self._moving:
            raise ValueError("feedback moves vectors, and none of the indexes has any; add a Dense one")
        mix({index.name: {} for index in indexes}, weights, normalize)  # refuses weights that do not fit
        self.corpus, self.indexes, self.name = indexes[0].corpus, indexes, name
        self.weights, self.normalize, self.feedback = weights, normalize, feedback
        self.rocchio, self.depth = rocchio, depth

    def ranked(self, query: str, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """See `Index.ranked`."""
        return {name: sum(parts.values()) for name, parts in self._mixed(query, k, within).items()}

    def search(self, query: str, k: int = 10, within: Collection[str] | None = None) -> list[Hit]:
        """See `Index.search`; the parts of a score are what each index contributed."""
        return self._hits(query, self._mixed(query, k, within))

    def matched(self, query: str, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The words that any of the indexes gives, in the order of the indexes."""
        found = [index.matched(query, ids) for index in self.indexes]
        return {name: tuple(dict.fromkeys(word for words in found for word in words.get(name, ()))) for name in ids}

    def _mixed(self, query: str, k: int, within: Collection[str] | None) -> dict[str, dict[str, float]]:
        """What each index contributes to the `k` best documents."""
        check_request(query, k)
        depth = max(k, self.depth)
        vectors = {index.name: index.vector(query) for index in self._moving}
        lists: dict[str, Scores] = {
            index.name: index.ranked(query, depth, within) for index in self.indexes if index.name not in vectors
        }
        lists |= {index.name: index.nearest(vectors[index.name], depth, within) for index in self._moving}
        if self.feedback:
            count = self.rocchio.documents
            mixed = None if self.feedback == "after" else self._mix(lists, count)
            second: dict[str, Scores] = {}
            for index in self._moving:
                first = list(lists[index.name] if mixed is None else mixed)[:count]
                vector = self.rocchio.alpha * vectors[index.name]
                if first:
                    vector = vector + self.rocchio.beta * index.vectors(first).mean(axis=0)
                second[index.name] = index.nearest(vector, depth, within)
            lists = second if self.feedback == "before" else {**lists, **second}
        return self._mix(lists, k)

    def _mix(self, lists: Mapping[str, Scores], k: int) -> dict[str, dict[str, float]]:
        weights = self.weights
        if not isinstance(weights, str):
            weights = [weight for weight, index in zip(weights, self.indexes) if index.name in lists]
        return mix(lists, weights, self.normalize, k)


class Reranked(Index):
    """The first documents of an index in the order of another score.

    Args:
        index: what finds the documents.
        scorer: a function of the query and a list of texts that gives a number for each text, larger is better, or a
            `CrossEncoder` of sentence-transformers.
        depth: documents that are scored; the others are not found.
        name: of this index among others.
    """

    def __init__(self, index: Index, scorer: Any, *, depth: int = 50, name: str = "reranked") -> None:
        self.corpus, self.index, self.scorer, self.depth, self.name = index.corpus, index, scorer, depth, name

    def ranked(self, query: str, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """See `Index.ranked`; at most `depth` documents.

        Raises:
            InvalidDataError: the scorer gives another number of scores than of texts.
        """
        check_request(query, k)
        documents = self.corpus.documents(self.index.ranked(query, self.depth, within))
        texts = [document.text for document in documents.values()]
        if not texts:
            return {}
        if hasattr(self.scorer, "predict"):
            scores = self.scorer.predict([(query, text) for text in texts])
        else:
            scores = self.scorer(query, texts)
        if len(scores) != len(texts):
            raise InvalidDataError(f"the scorer gave {len(scores)} scores for {len(texts)} texts")
        return best({name: float(score) for name, score in zip(documents, scores)}, k)

    def matched(self, query: str, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Those of the index that is reranked."""
        return self.index.matched(query, ids)


def mmr(scores: Scores, vectors: Any, k: int, trade_off: float = 0.7) -> list[str]:
    """Ids of `k` documents that are relevant and unlike each other: maximal marginal relevance (Carbonell & Goldstein,
    1998). Each next document has the largest `trade_off · relevance - (1 - trade_off) · similarity`, with its relevance
    on a scale of 0 to 1 and its largest similarity to those before it.

    Args:
        scores: {document id: score}.
        vectors: of the documents in the order of `scores`, `(n, dim)`, of length 1: `Dense.vectors(scores)`.
        k: how many, at most.
        trade_off: 1 for relevance alone, 0 for difference alone.
    """
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off must be from 0 to 1, got {trade_off}")
    rows = {name: row for row, name in enumerate(scores)}
    left = best(normalized(scores))
    closest = dict.fromkeys(left, 0.0)
    chosen: list[str] = []
    while left and len(chosen) < k:
        name = max(left, key=lambda name: trade_off * left[name] - (1 - trade_off) * closest[name])
        chosen.append(name)
        del left[name]
        similar = (vectors @ vectors[rows[name]]).tolist()
        closest = {each: max(closest[each], similar[rows[each]]) for each in left}
    return chosen
