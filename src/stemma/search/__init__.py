"""Find texts: by words, by vectors, by learned sparse vectors, mixed; and measure rankings.

A corpus is one SQLite file, an index a folder of plain arrays beside it. `Corpus`, `Lexical` and `evaluate` need the
standard library alone; `Dense` and `Sparse` need numpy and an encoder: one of sentence-transformers (the extra
`search`), or any function from texts to vectors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemma.search.corpus import Corpus
    from stemma.search.dense import Dense
    from stemma.search.fused import Fused, Reranked, Rocchio, mmr
    from stemma.search.index import Hit, Index
    from stemma.search.lexical import Lexical
    from stemma.search.metrics import compare, evaluate
    from stemma.search.runs import fuse, read_qrels, read_run, write_run
    from stemma.search.sparse import Sparse

# Name -> module, resolved on first use: only `Dense` and `Sparse` import numpy.
_PUBLIC = {
    "Corpus": "corpus",
    "Dense": "dense",
    "Fused": "fused",
    "Hit": "index",
    "Index": "index",
    "Lexical": "lexical",
    "Reranked": "fused",
    "Rocchio": "fused",
    "Sparse": "sparse",
    "compare": "metrics",
    "evaluate": "metrics",
    "fuse": "runs",
    "mmr": "fused",
    "read_qrels": "runs",
    "read_run": "runs",
    "write_run": "runs",
}

__all__ = [
    "Corpus",
    "Dense",
    "Fused",
    "Hit",
    "Index",
    "Lexical",
    "Reranked",
    "Rocchio",
    "Sparse",
    "compare",
    "evaluate",
    "fuse",
    "mmr",
    "read_qrels",
    "read_run",
    "write_run",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"stemma.search.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stemma.search' has no attribute '{name}'")
