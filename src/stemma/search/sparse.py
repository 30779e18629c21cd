"""Search by learned words: a sparse vector over a vocabulary for each text, inner products over an inverted index.

Encoders of this kind (SPLADE) give a weight to words of the text and to others that it might have used; which of them
met can be shown for every hit.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from stemma.errors import InvalidDataError
from stemma.search.corpus import Corpus
from stemma.search.encoded import Encoded, encoded_by, load_encoder
from stemma.search.index import check_request
from stemma.search.runs import best_rows
from stemma.search.store import Array, Store

__all__ = ["Sparse"]

_SHOWN = 8
"""Terms of a hit that `matched` gives."""


class Sparse(Encoded):
    """Sparse vectors of the texts of a corpus, as compressed sparse rows in the folder `CORPUS.NAME` beside it.

    Args:
        corpus: the documents.
        encoder: a folder or hub id of a `SparseEncoder` of sentence-transformers, such an encoder, or any function from
            a list of texts to a matrix `(n, vocabulary)`: of scipy, sparse of torch, or dense. Where it has
            `encode_query` and `encode_document`, each is used for its own.
        top_k: of a text only the largest weights are kept, of equal ones those of the first terms; None keeps all.
        terms: the names of some terms, for `Hit.matched`; default: the encoder's tokenizer, where it has one.
        follow: encode new texts at once and before each search; otherwise an index that lacks texts is refused.
        name: of this index among others over the corpus.

    Raises:
        InvalidDataError: the index that is there was made for another corpus or by another encoder.
        MissingExtraError: a package is not installed.

    ```python
    from stemma.search import Corpus, Sparse

    corpus = Corpus.open("texts.sqlite")
    corpus.add([{"id": "a", "text": "aab"}, {"id": "b", "text": "bbb"}])
    letters = Sparse(
        corpus,
        lambda texts: [[text.count(letter) for letter in "ab"] for text in texts],
        terms=lambda numbers: ["ab"[number] for number in numbers],
    )
    print([(hit.id, hit.score, hit.matched) for hit in letters.search("bba")])
    # prints: [('b', 6.0, ('b',)), ('a', 4.0, ('a', 'b'))]
    ```
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Any,
        *,
        top_k: int | None = None,
        terms: Callable[[Sequence[int]], Sequence[str]] | None = None,
        follow: bool = True,
        name: str = "sparse",
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        encoder = load_encoder(encoder, "SparseEncoder")
        tokenizer = getattr(encoder, "tokenizer", None)
        self.top_k, self._terms = top_k, terms or getattr(tokenizer, "convert_ids_to_tokens", None)
        super().__init__(corpus, encoder, name, follow)

    def ranked(self, query: str, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """See `Index.ranked`; documents that share no term with the query are not found."""
        check_request(query, k)
        store = self._current()
        if store is None:
            return {}
        terms, weights = self._query(query)
        scores = np.zeros(len(self._ids))
        for term, weight in zip(terms, weights):
            begin, end = self._starts[term : term + 2]
            scores[self._posted[begin:end]] += weight * self._weights[begin:end]  # a document has a term once
        return best_rows(np.where(self._allowed(within), scores, 0), self._ids, k, above=0)

    def contributions(self, query: str, ids: Collection[str]) -> dict[str, dict[int, float]]:
        """What each term adds to the score of each document, largest first."""
        rows = self._rows_of(ids)
        if not rows:
            return {}
        asked = dict(zip(*(each.tolist() for each in self._query(query))))
        found = {}
        for name, row in zip(ids, rows):
            parts = {term: asked[term] * weight for term, weight in self._row_of(row).items() if term in asked}
            found[name] = dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))
        return found

    def matched(self, query: str, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The terms that add most to the score of each document, largest first."""
        if self._terms is None:
            return {}
        return {
            name: tuple(self._terms(list(parts)[:_SHOWN])) for name, parts in self.contributions(query, ids).items()
        }

    def _query(self, query: str) -> tuple[Array, Array]:
        """Terms and weights of a query."""
        assert self._store is not None
        terms, weights, _, size = _rows(encoded_by(self.encoder, "query")([query]), ["the query"])
        if size != self._store.about["vocabulary"]:
            raise InvalidDataError(
                f"the query's vector has {size} terms, those in {self.folder} {self._store.about['vocabulary']}"
            )
        return terms, weights

    def _encode(self, texts: Sequence[str], numbers: Sequence[int]) -> dict[str, Array]:
        matrix = encoded_by(self.encoder, "document")(list(texts))
        terms, weights, ends, self._size = _rows(matrix, [f"text {number}" for number in numbers], self.top_k)
        before = self._store.rows["terms"] if self._store else 0
        return {"terms": terms, "weights": weights, "ends": before + ends}

    def _open(self, arrays: dict[str, Array]) -> Store:
        columns = {"terms": ("int32", ()), "weights": ("float32", ()), "ends": ("int64", ()), "numbers": ("int64", ())}
        about = {"corpus": self.corpus.id, "vocabulary": self._size, "top_k": self.top_k}
        return Store.open(self.folder, columns, about)

    def _differs(self, row: int, arrays: dict[str, Array]) -> float:
        held = self._row_of(row)
        made = dict(zip(arrays["terms"].tolist(), arrays["weights"].tolist()))
        squares = sum((held.get(term, 0) - made.get(term, 0)) ** 2 for term in {**held, **made})
        return float(np.sqrt(squares / max(sum(weight**2 for weight in held.values()), 1e-24)))

    def _row_of(self, row: int) -> dict[int, float]:
        """Terms and weights of a row of the store."""
        assert self._store is not None
        begin, end = (int(self._store["ends"][row - 1]) if row else 0), int(self._store["ends"][row])
        return dict(zip(self._store["terms"][begin:end].tolist(), self._store["weights"][begin:end].tolist()))

    def _look(self, revision: int) -> None:
        """Sort the weights by term."""
        super()._look(revision)
        if self._store is None:
            return
        size, terms = self._store.about["vocabulary"], self._store["terms"]
        # Numpy sorts 16-bit numbers in linear time.
        order = np.argsort(terms.astype(np.uint16) if size <= 2**16 else terms, kind="stable")
        lengths = np.diff(self._store["ends"], prepend=0)
        self._posted = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
        self._weights = self._store["weights"][order]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=size))])


def _rows(matrix: Any, names: Sequence[str], top_k: int | None = None) -> tuple[Array, Array, Array, int]:
    """Terms, weights and the end of each row of an encoder's matrix, terms ascending in a row; and its width.

    Raises:
        InvalidDataError: the matrix does not have a row for each text, or a weight is not finite.
    """
    if getattr(matrix, "is_sparse", False):  # of torch
        matrix = matrix.detach().cpu().coalesce()
        rows, terms = matrix.indices().numpy()
        weights = matrix.values().float().numpy()
    elif hasattr(matrix, "tocsr"):  # of scipy
        matrix = matrix.tocsr()
        matrix.sum_duplicates()
        rows, terms, weights = (
            np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)),
            matrix.indices,
            matrix.data,
        )
    else:
        matrix = np.asarray(matrix, np.float32)
        rows, terms = matrix.nonzero() if matrix.ndim == 2 else (np.empty(0, int), np.empty(0, int))
        weights = matrix[rows, terms] if matrix.ndim == 2 else np.empty(0)
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] != len(names):
        raise InvalidDataError(
            f"the encoder gave a matrix of shape {shape} for {len(names)} texts; expected ({len(names)}, vocabulary)"
        )
    if not np.isfinite(weights).all():
        bad = int(rows[~np.isfinite(weights)][0])
        raise InvalidDataError(f"the encoder's vector of {names[bad]} is not finite")
    kept = weights != 0
    rows, terms, weights = rows[kept], terms[kept], weights[kept].astype(np.float32)
    if top_k is not None:
        order = np.lexsort((terms, -weights, rows))
        starts = np.searchsorted(rows[order], rows[order])
        kept = order[np.arange(len(order)) - starts < top_k]
        rows, terms, weights = rows[kept], terms[kept], weights[kept]
    order = np.lexsort((terms, rows))
    ends = np.cumsum(np.bincount(rows, minlength=len(names)))
    return terms[order].astype(np.int32), weights[order], ends, shape[1]
