"""Search by meaning: one vector for each text, exact inner products, in blocks of a memory-mapped file."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from stemma.errors import InvalidDataError, MissingExtraError
from stemma.files import replacing
from stemma.search.corpus import Corpus
from stemma.search.encoded import Encoded, encoded_by, load_encoder
from stemma.search.index import check_request
from stemma.search.runs import best_rows
from stemma.search.store import Array, Store, products

__all__ = ["Dense"]


class Dense(Encoded):
    """Vectors of the texts of a corpus.

    The vectors are in the folder `CORPUS.NAME` beside the corpus, `(rows, dim)`. With an encoder whose vector of a text
    does not depend on the texts beside it, an index made at once and one made in pieces are equal to the bit.

    Args:
        corpus: the documents.
        encoder: a folder or hub id of a sentence-transformers model, such a model, or any function from a list of texts
            to an array `(n, dim)`. Where it has `encode_query` and `encode_document`, each is used for its own.
        similarity: "cosine" divides vectors by their lengths, "dot" does not.
        dtype: of the stored vectors; float16 takes half the space and is read more slowly. None: as they are stored,
            float32 where there are none yet.
        faiss: None for exact products with numpy, or the name of an index of faiss that needs no training, such as
            "Flat" (exact) or "HNSW32" (approximate); package faiss-cpu, extra `search`.
        follow: encode new texts at once and before each search; otherwise an index that lacks texts is refused.
        name: of this index among others over the corpus.

    Raises:
        InvalidDataError: the index that is there was made for another corpus or by another encoder.
        MissingExtraError: a package is not installed.

    ```python
    from stemma.search import Corpus, Dense

    corpus = Corpus.open("texts.sqlite")
    corpus.add([{"id": "a", "text": "aab"}, {"id": "b", "text": "bbb"}])
    letters = Dense(corpus, lambda texts: [[text.count(letter) for letter in "ab"] for text in texts])
    print([hit.id for hit in letters.search("bbba", k=1)])
    # prints: ['b']
    ```
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Any,
        *,
        similarity: Literal["cosine", "dot"] = "cosine",
        dtype: Literal["float32", "float16"] | None = None,
        faiss: str | None = None,
        follow: bool = True,
        name: str = "dense",
    ) -> None:
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity must be 'cosine' or 'dot', got {similarity!r}")
        self.similarity, self.dtype = similarity, dtype
        self._faiss = _Faiss(faiss) if faiss else None
        super().__init__(corpus, load_encoder(encoder, "SentenceTransformer"), name, follow)

    def ranked(self, query: str, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """See `Index.ranked`."""
        check_request(query, k)
        return self.nearest(self.vector(query), k, within)

    def vector(self, query: str) -> Array:
        """The vector of a query, `(dim,)`, float32."""
        return self._vectors("query", [query], ["the query"])[0]

    def vectors(self, ids: Collection[str]) -> Array:
        """The stored vectors of documents, `(len(ids), dim)`, float32.

        Raises:
            InvalidDataError: the index does not hold one of them.
        """
        rows = self._rows_of(ids)
        return np.empty((0, 0), np.float32) if self._store is None else self._store["vectors"][rows].astype(np.float32)

    def nearest(self, vector: Array, k: int, within: Collection[str] | None = None) -> dict[str, float]:
        """As `ranked`, for the vector of a query, `(dim,)`.

        Raises:
            InvalidDataError: it has another size than those of the index.
        """
        store = self._current()
        if store is None:
            return {}
        matrix, allowed = store["vectors"], self._allowed(within)
        if vector.shape != matrix.shape[1:]:
            raise InvalidDataError(
                f"the query has {vector.shape} values, the vectors in {self.folder} {matrix.shape[1:]}"
            )
        if self._faiss is not None and within is None:
            scores, rows = self._faiss.search(store, vector[None], min(k + int((~allowed).sum()), len(matrix)))
            kept = [(self._ids[row], score) for row, score in zip(rows[0], scores[0]) if row >= 0 and allowed[row]]
            return dict(sorted(kept, key=lambda item: (-item[1], item[0]))[:k])
        scores = np.concatenate([found[0] for _, found in products(matrix, vector[None])])
        return best_rows(np.where(allowed, scores, -np.inf), self._ids, k)

    def _encode(self, texts: Sequence[str], numbers: Sequence[int]) -> dict[str, Array]:
        return {"vectors": self._vectors("document", texts, [f"text {number}" for number in numbers])}

    def _vectors(self, kind: str, texts: Sequence[str], names: Sequence[str]) -> Array:
        vectors: Array = np.asarray(encoded_by(self.encoder, kind)(list(texts)), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
            raise InvalidDataError(
                f"the encoder gave an array of shape {vectors.shape} for {len(texts)} texts, not ({len(texts)}, dim)"
            )
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise InvalidDataError(f"the encoder's vector of {names[bad]} is not finite: {texts[bad]!r:.60}")
        if self.similarity == "cosine":
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.where(lengths > 0, lengths, 1)
        return vectors

    def _open(self, arrays: dict[str, Array]) -> Store:
        held = self._store.columns["vectors"][0] if self._store is not None else "float32"
        columns = {"vectors": (self.dtype or held, arrays["vectors"].shape[1:]), "numbers": ("int64", ())}
        return Store.open(self.folder, columns, {"corpus": self.corpus.id, "similarity": self.similarity})

    def _differs(self, row: int, arrays: dict[str, Array]) -> float:
        assert self._store is not None
        held, made = self._store["vectors"][row].astype(np.float32), arrays["vectors"][0]
        return float(np.linalg.norm(held - made)) / max(float(np.linalg.norm(held)), 1e-12)


class _Faiss:
    """An index of faiss over the vectors of a store; kept in a file, but for a flat one, which takes no time."""

    def __init__(self, kind: str) -> None:
        try:
            import faiss
        except ImportError as error:
            raise MissingExtraError("faiss-cpu", "search", f"Dense(faiss='{kind}')") from error
        self._faiss, self._kind = faiss, kind
        self._index: Any = None

    def search(self, store: Store, queries: Array, k: int) -> tuple[Array, Array]:
        """Scores and rows, `(queries, k)`; rows of -1 where fewer were found."""
        vectors, path = store["vectors"], store.folder / f"faiss.{self._kind}"
        if self._index is None and path.exists():
            self._index = self._faiss.read_index(str(path))
        if self._index is None or self._index.ntotal > len(vectors):
            self._index = self._faiss.index_factory(vectors.shape[1], self._kind, self._faiss.METRIC_INNER_PRODUCT)
            if not self._index.is_trained:
                raise ValueError(f"faiss='{self._kind}' needs training; use a kind that does not, such as 'HNSW32'")
        if self._index.ntotal < len(vectors):
            self._index.add(np.ascontiguousarray(vectors[self._index.ntotal :], np.float32))
            if self._kind != "Flat":
                with replacing(path) as temporary:
                    self._faiss.write_index(self._index, str(temporary))
        return self._index.search(np.ascontiguousarray(queries, np.float32), k)
