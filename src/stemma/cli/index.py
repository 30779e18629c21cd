"""Put texts into a corpus, one SQLite file, and bring its indexes up to date.

Reads --input, a JSONL file with an id and a text on each line, into the corpus, whose full-text index is then ready for
`stemma search`. With --encoder and --sparse-encoder, texts that those indexes lack are encoded into folders beside the
file. What was interrupted goes on when the same command is given again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma index`."""

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """SQLite file of the corpus; made by --input where there is none."""
    input: Path | None = None
    """JSONL file of texts; what the corpus has already is left as it is."""
    id_field: str = "id"
    """Field with the id."""
    text_fields: tuple[str, ...] = ("text",)
    """Field with the text, or several that make it up; the others are kept as metadata."""
    update: bool = False
    """Replace texts whose id is there with other content, instead of refusing the file."""
    encoder: str | None = None
    """Folder or hub id of a sentence-transformers model, for search by meaning."""
    sparse_encoder: str | None = None
    """Folder or hub id of a sparse encoder of sentence-transformers (SPLADE)."""
    dtype: Literal["float32", "float16"] | None = None
    """Type of the stored vectors of --encoder; default: as they are, float32 where there are none yet."""


def main(config: Config) -> dict[str, Any]:
    """Import and encode, and report how many texts there are."""
    import dataclasses

    from stemma.search import Corpus, Dense, Sparse

    result: dict[str, Any] = {}
    corpus = Corpus.open(config.corpus, create=config.input is not None)
    if config.input is not None:
        added = corpus.import_jsonl(config.input, id=config.id_field, text=config.text_fields, update=config.update)
        print(f"{config.input}: {added.new:,} new, {added.updated:,} replaced, {added.unchanged:,} there already")
        result |= dataclasses.asdict(added)
    if config.encoder is not None:
        result["encoded"] = Dense(corpus, config.encoder, dtype=config.dtype, follow=False).update()
        print(f"encoded {result['encoded']:,} texts")
    if config.sparse_encoder is not None:
        result["sparse_encoded"] = Sparse(corpus, config.sparse_encoder, follow=False).update()
        print(f"encoded {result['sparse_encoded']:,} texts as sparse vectors")
    print(f"{config.corpus}: {len(corpus):,} texts")
    return {"corpus": config.corpus, "texts": len(corpus), **result}
