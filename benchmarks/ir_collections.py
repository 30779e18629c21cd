"""Classic collections for retrieval, read from their own formats: texts, queries and judgements.

The folder `ir` of `$STEMMA_DATA` holds `cranfield/cran.{xml,qry,qrels}` (oussbenk/cranfield-trec-dataset),
`cacm/cacm.{tar.gz,topics,qrels}` (castorini/anserini and anserini-tools), `cisi/cisi.{ALL,QRY,REL}`
(Shakiba-Alipour/Information-Retrieval-on-CISI) and `vaswani/vaswani.{trec,qry,qrels}` (terrier-org/terrier-core).
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from stemma.search.runs import Qrels, read_qrels

NAMES = ("cacm", "cranfield", "cisi", "vaswani")


@dataclass(frozen=True)
class Collection:
    """What is searched, what is asked, and what is relevant. Queries that nobody judged are left out."""

    name: str
    texts: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels


def folder() -> Path | None:
    """Where the collections are; None where `$STEMMA_DATA` does not hold them."""
    path = Path(os.environ.get("STEMMA_DATA", "")) / "ir"
    return path if "STEMMA_DATA" in os.environ and all((path / name).is_dir() for name in NAMES) else None


def load(name: str, path: Path) -> Collection:
    """One collection of the folder `path`."""
    texts, queries, qrels = {"cacm": _cacm, "cranfield": _cranfield, "cisi": _cisi, "vaswani": _vaswani}[name](
        path / name
    )
    judged = {query: text for query, text in queries.items() if query in qrels}
    # A judged text that the collection does not have is left out too, as is an empty one, which nothing can find.
    texts = {document: text for document, text in texts.items() if text.strip()}
    return Collection(name, texts, judged, {query: qrels[query] for query in judged})


def _cacm(path: Path) -> tuple[dict[str, str], dict[str, str], Qrels]:
    texts = {}
    with tarfile.open(path / "cacm.tar.gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".html"):
                file = archive.extractfile(member)
                assert file is not None
                body = _between("<pre>", "</pre>", file.read().decode("latin-1"))[0]
                texts[Path(member.name).stem] = re.split(r"\nCA\d{6}", body)[0].strip()  # citations follow the date
    queries = _numbered("DOC", "DOCNO", _text(path / "cacm.topics"))
    qrels = {  # CACM-115 is the file CACM-0115
        query: {f"CACM-{int(document.partition('-')[2]):04}": grade for document, grade in grades.items()}
        for query, grades in read_qrels(path / "cacm.qrels").items()
    }
    return texts, queries, qrels


def _cranfield(path: Path) -> tuple[dict[str, str], dict[str, str], Qrels]:
    texts = {}
    for document in _between("<doc>", "</doc>", _text(path / "cran.xml")):
        (number,) = _between("<docno>", "</docno>", document)
        texts[number.strip()] = _between("<text>", "</text>", document)[0].strip()  # begins with the title
    titles = _between("<title>", "</title>", _text(path / "cran.qry"))
    # The judgements number the queries by their place, not by the numbers that stand there.
    queries = {str(place): title.strip() for place, title in enumerate(titles, start=1)}
    return texts, queries, read_qrels(path / "cran.qrels")


def _cisi(path: Path) -> tuple[dict[str, str], dict[str, str], Qrels]:
    def fields(name: str) -> dict[str, str]:
        found = {}
        for entry in re.split(r"^\.I ", _text(path / name), flags=re.MULTILINE)[1:]:
            number, _, body = entry.partition("\n")
            parts = re.findall(r"^\.([TW])[ ]*\n(.*?)(?=^\.[A-Z][ ]*$|\Z)", body, flags=re.MULTILINE | re.DOTALL)
            found[number.strip()] = "\n".join(text.strip() for _, text in parts)
        return found

    qrels: Qrels = {}
    for line in _text(path / "cisi.REL").splitlines():
        query, document, *_ = line.split()
        qrels.setdefault(query, {})[document] = 1
    return fields("cisi.ALL"), fields("cisi.QRY"), qrels


def _vaswani(path: Path) -> tuple[dict[str, str], dict[str, str], Qrels]:
    queries = {
        _between("<num>", "</num>", topic)[0].strip(): _between("<title>", "</title>", topic)[0].strip().lower()
        for topic in _between("<top>", "</top>", _text(path / "vaswani.qry"))
    }
    return _numbered("DOC", "DOCNO", _text(path / "vaswani.trec")), queries, read_qrels(path / "vaswani.qrels")


def _text(path: Path) -> str:
    return path.read_text(encoding="latin-1")


def _between(begin: str, end: str, text: str) -> list[str]:
    return re.findall(f"{begin}(.*?){end}", text, flags=re.DOTALL)


def _numbered(entry: str, number: str, text: str) -> dict[str, str]:
    """Texts by the number that each begins with."""
    found = re.findall(f"<{entry}>\\s*<{number}>(.*?)</{number}>(.*?)</{entry}>", text, flags=re.DOTALL)
    return {name.strip(): body.strip() for name, body in found}
