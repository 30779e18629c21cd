"""Search a corpus by words, by meaning, or by both.

Answers one QUERY with its --k best texts, or a file of --queries with a TREC run in --output. Words alone are searched
unless an encoder is given, the one that `stemma index` was given; scores of several indexes are mixed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma search`."""

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """SQLite file that `stemma index` made."""
    query: Annotated[str | None, tyro.conf.Positional] = None
    """What to look for; any text, no character has a meaning of its own."""
    queries: Path | None = None
    """JSONL file of queries, {"id": "1", "text": "..."} on each line."""
    output: Path | None = None
    """TREC run to write for --queries."""
    k: int = 10
    """Texts per query."""
    engine: Literal["fts5", "bm25s"] = "fts5"
    """Index of words: SQLite's, or bm25s (extra `search`), which is faster from some ten thousand texts on."""
    encoder: str | None = None
    """Folder or hub id of the sentence-transformers model."""
    sparse_encoder: str | None = None
    """Folder or hub id of the sparse encoder."""
    weights: Literal["linear", "rrf"] = "linear"
    """How several indexes are mixed: normalised scores, or reciprocal ranks."""
    feedback: Literal["none", "before", "after", "both"] = "none"
    """Move the query's vector towards what it finds first; indexes are mixed before that, after it, or both."""

    def __post_init__(self) -> None:
        if (self.query is None) == (self.queries is None) or (self.queries is None) != (self.output is None):
            raise ValueError("give either QUERY, or --queries FILE with --output RUN.")
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, got {self.k}.")
        if self.feedback != "none" and self.encoder is None:
            raise ValueError("--feedback moves vectors; give the --encoder that makes them.")


def main(config: Config) -> dict[str, Any]:
    """Print the hits, or write the run."""
    import dataclasses

    from stemma.data.records import read_jsonl, text_field
    from stemma.errors import InvalidDataError
    from stemma.search import Corpus, Dense, Fused, Index, Lexical, Sparse, write_run

    corpus = Corpus.open(config.corpus, create=False)
    indexes: list[Index] = [Lexical(corpus, engine=config.engine)]
    if config.encoder is not None:
        indexes.append(Dense(corpus, config.encoder, follow=False))
    if config.sparse_encoder is not None:
        indexes.append(Sparse(corpus, config.sparse_encoder, follow=False))
    feedback = None if config.feedback == "none" else config.feedback
    index = indexes[0] if len(indexes) == 1 else Fused(*indexes, weights=config.weights, feedback=feedback)
    if config.query is not None:
        hits = index.search(config.query, config.k)
        for rank, hit in enumerate(hits, start=1):
            parts = ", ".join(f"{name} {value:.3f}" for name, value in hit.parts.items())
            print(f"{rank:3}. {hit.id}  {hit.score:.3f} ({parts})  {' '.join(hit.matched)}")
            print(f"     {' '.join(hit.text.split())[:100]}")
        if not hits:
            print(f"nothing found among {len(corpus):,} texts")
        return {"hits": [dataclasses.asdict(hit) for hit in hits]}
    assert config.queries is not None
    assert config.output is not None
    queries: dict[str, str] = {}
    for number, record in read_jsonl(config.queries):
        name = str(record.get("id", ""))
        if name in queries or not name.strip():
            raise InvalidDataError(
                f"{config.queries}, line {number}: field 'id' must be there, and another on each line"
            )
        queries[name] = text_field(config.queries, number, record, "text")
    write_run(config.output, index.run(queries, config.k))
    print(f"{config.output}: {len(queries):,} queries")
    return {"queries": len(queries), "output": config.output}
