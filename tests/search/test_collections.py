"""Search by words on real collections: what others measured with BM25, and the same figures from both engines."""

import pytest
from benchmarks import ir_collections

from stemma.search import Corpus, Lexical, evaluate

DATA = ir_collections.folder()
pytestmark = pytest.mark.skipif(DATA is None, reason="needs STEMMA_DATA=FOLDER with ir/cacm and the others")

# nDCG@10 of BM25 (k1 1.2, b 0.75, stems, English stop words), measured apart from this code.
KNOWN = {"cacm": 0.521, "cranfield": 0.376, "cisi": 0.382}


@pytest.mark.parametrize("engine", ["fts5", "bm25s"])
@pytest.mark.parametrize("name", KNOWN)
def test_words_find_what_bm25_finds_elsewhere(tmp_path, name, engine):
    if engine == "bm25s":
        pytest.importorskip("bm25s")
        pytest.importorskip("Stemmer")
    collection = ir_collections.load(name, DATA)
    corpus = Corpus.open(tmp_path / "c.sqlite")
    corpus.add({"id": document, "text": text} for document, text in collection.texts.items())
    run = Lexical(corpus, engine=engine).run(collection.queries, k=100)
    assert evaluate(collection.qrels, run, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(KNOWN[name], abs=0.03)
