"""Dense search: equal to a full product, whole or in pieces; stale indexes and other encoders are noticed."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from search.letters import corpus_of, letters, made_up
from stemma.errors import InvalidDataError, MissingExtraError
from stemma.search.corpus import Corpus
from stemma.search.dense import Dense
from stemma.search.store import Store


def reference(records, query, similarity="cosine"):
    """All documents by falling product, equal ones by id."""
    vectors, vector = letters([each["text"] for each in records]), letters([query])[0]
    if similarity == "cosine":
        vectors, vector = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), vector / np.linalg.norm(vector)
    products = (vectors.astype(np.float32) @ vector.astype(np.float32)).tolist()
    return sorted(((each["id"], product) for each, product in zip(records, products)), key=lambda x: (-x[1], x[0]))


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "c.sqlite", made_up(120))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("faiss", [None, "Flat"])
def test_hits_are_those_of_a_full_product(corpus, similarity, faiss):
    if faiss:
        pytest.importorskip("faiss")
    index = Dense(corpus, letters, similarity=similarity, faiss=faiss)
    for query in ("bbc", "m", "k k d f"):
        expected = reference(made_up(120), query, similarity)
        found = index.ranked(query, 120)
        assert found == pytest.approx(dict(expected), abs=1e-6)
        assert list(found.items()) == sorted(found.items(), key=lambda item: (-item[1], item[0]))
        assert list(index.ranked(query, 7)) == list(found)[:7] or faiss
        within = set(list(found)[20:60:2])
        assert list(index.ranked(query, 5, within)) == [name for name in found if name in within][:5]
    assert index.search("bbc", k=1)[0].parts == {"dense": index.search("bbc", k=1)[0].score}


def test_rounded_vectors_rank_nearly_alike(corpus):
    whole, half = Dense(corpus, letters), Dense(corpus, letters, dtype="float16", name="half")
    assert half.ranked("bbc", 120) == pytest.approx(whole.ranked("bbc", 120), abs=2e-3)
    assert (half.folder / "vectors.bin").stat().st_size == (whole.folder / "vectors.bin").stat().st_size / 2


def test_whole_and_in_pieces_are_equal_to_the_bit(corpus, tmp_path):
    whole = Dense(corpus, letters)
    records = made_up(120)
    pieces = corpus_of(tmp_path / "p.sqlite", records[:10])
    index = Dense(pieces, letters)
    for begin, end in ((10, 11), (11, 90), (90, 120)):
        pieces.add(records[begin:end])
        index.ranked("b", 1)
    assert (index.folder / "vectors.bin").read_bytes() == (whole.folder / "vectors.bin").read_bytes()
    assert index.ranked("bcd", 50) == whole.ranked("bcd", 50)


def test_the_index_follows_its_corpus(corpus):
    calls = []

    def counted(texts):
        calls.extend(texts)
        return letters(texts)

    index = Dense(corpus, counted)
    assert len(calls) == 120
    corpus.remove(["d0003"])
    corpus.add([{"id": "d0005", "text": "mmmmm"}, {"id": "new", "text": "kkkkk"}], update=True)
    assert list(index.ranked("m", 1)) == ["d0005"]
    assert calls[120:] == ["m", "mmmmm", "kkkkk"]  # the query, and what the index lacked
    assert "d0003" not in index.ranked("b", 1000)
    assert len(index.ranked("b", 1000)) == 120
    corpus.add([{"id": "d0005", "text": "mmmmm", "votes": 3}], update=True)
    index.ranked("m", 1)
    assert calls[123:] == ["b", "b", "m"]
    assert np.array_equal(index.vectors(["new", "d0005"]), np.eye(8, dtype=np.float32)[[6, 7]])
    with pytest.raises(InvalidDataError, match="does not hold the document 'd0003'"):
        index.vectors(["new", "d0003"])


def test_a_stale_index_is_refused_where_it_may_not_follow(corpus):
    with pytest.raises(InvalidDataError, match=r"lacks 120 texts of .*; call update"):
        Dense(corpus, letters, follow=False).ranked("b", 1)
    Dense(corpus, letters)
    index = Dense(corpus, letters, follow=False)
    assert index.ranked("b", 1)
    corpus.remove(["d0001"])
    assert "d0001" not in index.ranked("b", 1000)
    corpus.add([{"id": "x", "text": "b"}])
    with pytest.raises(InvalidDataError, match="lacks 1 texts"):
        index.ranked("b", 1)
    assert Dense(corpus, letters, follow=False).update() == 1  # as another process would
    assert "x" in index.ranked("b", 1000)


def test_another_encoder_or_corpus_is_noticed(corpus, tmp_path):
    Dense(corpus, letters)
    for encoder, complaint in (
        (lambda texts: letters(texts)[:, ::-1], "was made by another encoder"),
        (lambda texts: letters(texts) + 0.1, "was made by another encoder"),
        (lambda texts: letters(texts)[:, :5], r"was made with vectors = .*8.*, now it is .*5"),
    ):
        for follow in (True, False):
            with pytest.raises(InvalidDataError, match=complaint):
                Dense(corpus, encoder, follow=follow).ranked("b", 1)
    Dense(corpus, lambda texts: letters(texts) * (1 + 1e-4))  # rounding
    with pytest.raises(InvalidDataError, match="was made with similarity = cosine, now it is dot"):
        Dense(corpus, letters, similarity="dot")
    other = corpus_of(tmp_path / "other.sqlite", made_up(5))
    (tmp_path / "c.sqlite.dense").rename(tmp_path / "other.sqlite.dense")
    with pytest.raises(InvalidDataError, match=r"other.sqlite.dense is not of this"):
        Dense(other, letters)


def test_a_text_that_comes_at_the_end_of_an_update_is_found(corpus, monkeypatch):
    late, numbers = [{"id": "late", "text": "mmmm"}], corpus.numbers

    def meanwhile():
        corpus.add([late.pop()] if late else [])
        return numbers()

    monkeypatch.setattr(corpus, "numbers", meanwhile)  # read last in an update
    index = Dense(corpus, letters)
    assert late == []
    assert list(index.ranked("m", 1)) == ["late"]


def test_threads_and_other_indexes_over_one_corpus_agree(corpus):
    index, other = Dense(corpus, letters), Dense(Corpus.open(corpus.path), letters)
    corpus.add(made_up(600, seed=1, first=200))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: index.ranked("bcd", 20), range(8)))
    assert all(each == found[0] for each in found)
    assert other.ranked("bcd", 20) == found[0]
    assert Store(index.folder).rows["numbers"] == 720  # every text was encoded once


def test_an_older_copy_of_the_corpus_is_noticed(corpus, tmp_path):
    older = Corpus.open(tmp_path / "older.sqlite")
    corpus.connection.backup(older.connection)
    corpus.add([{"id": "x", "text": "b"}])
    index = Dense(corpus, letters)
    index.folder.rename(tmp_path / "older.sqlite.dense")
    with pytest.raises(InvalidDataError, match="is not of this"):
        Dense(Corpus.open(older.path), letters)


def test_queries_and_documents_may_be_encoded_apart(corpus):
    encoder = SimpleNamespace(encode_query=lambda texts: letters(texts)[:, ::-1], encode_document=letters)
    assert Dense(corpus, encoder).ranked("b", 120) == Dense(corpus, letters, name="plain").ranked("m", 120)


def test_bad_vectors_are_named(corpus):
    for encoder, complaint in (
        (lambda texts: letters(texts)[0], r"gave an array of shape \(8,\) for 120 texts"),
        (lambda texts: letters(texts)[1:], r"gave an array of shape \(119, 8\) for 120 texts"),
        (lambda texts: np.where(letters(texts) > 2, np.nan, letters(texts)), "vector of text .* is not finite"),
    ):
        with pytest.raises(InvalidDataError, match=complaint):
            Dense(corpus, encoder)
        assert not Dense(corpus, letters, follow=False).folder.exists()
    index = Dense(corpus, SimpleNamespace(encode_query=lambda texts: letters(texts)[:, :3], encode_document=letters))
    with pytest.raises(InvalidDataError, match=r"the query has \(3,\) values, the vectors in .* \(8,\)"):
        index.ranked("b", 1)
    with pytest.raises(InvalidDataError, match="the query is empty"):
        index.ranked(" ", 1)


def test_an_empty_corpus_finds_nothing(tmp_path):
    index = Dense(Corpus.open(tmp_path / "c.sqlite"), letters)
    assert index.search("b") == []
    index.corpus.add([{"id": "zero", "text": "xyz"}])
    assert index.ranked("b", 3) == {"zero": 0.0}  # a vector of zeros


def test_packages_that_are_not_there_are_named(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"faiss-cpu.*stemma-lm\[search\]"):
        Dense(corpus, letters, faiss="Flat")
    with pytest.raises(MissingExtraError, match="sentence-transformers"):
        Dense(corpus, "some/folder")


def test_an_approximate_index_is_kept_and_added_to(tmp_path):
    pytest.importorskip("faiss")
    corpus = corpus_of(tmp_path / "c.sqlite", made_up(300))
    Dense(corpus, letters, faiss="HNSW16").ranked("b", 5)
    corpus.add(made_up(100, seed=1, first=300))
    corpus.remove(["d0001"])
    found = Dense(corpus, letters, faiss="HNSW16").ranked("bcd", 50)
    exact = Dense(corpus, letters).ranked("bcd", 50)
    assert len(found.keys() & exact.keys()) >= 45
    assert (tmp_path / "c.sqlite.dense" / "faiss.HNSW16").exists()
    with pytest.raises(ValueError, match="needs training"):
        Dense(corpus, letters, faiss="IVF4,Flat").ranked("b", 1)


BUILD = """
import sys, time
from search.letters import letters
from stemma.search import Corpus, Dense

def slow(texts):
    time.sleep(0.05)
    return letters(texts)

Dense(Corpus.open(sys.argv[1]), slow)
"""


def test_a_killed_build_goes_on_to_the_same_index(tmp_path):
    records = made_up(5000)
    whole = Dense(corpus_of(tmp_path / "whole.sqlite", records), letters)
    corpus = corpus_of(tmp_path / "c.sqlite", records)
    folder = tmp_path / "c.sqlite.dense"
    process = subprocess.Popen([sys.executable, "-c", BUILD, corpus.path], env={"PYTHONPATH": ":".join(sys.path)})
    while not folder.exists() or Store(folder).rows["numbers"] < 1024:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    rows = Store(folder).rows["numbers"]
    assert 1024 <= rows < 5000
    index = Dense(corpus, letters, follow=False)
    assert index.update() == 5000 - rows
    for name in ("vectors.bin", "numbers.bin", "manifest.json"):
        assert (folder / name).read_bytes().replace(corpus.id.encode(), whole.corpus.id.encode()) == (
            whole.folder / name
        ).read_bytes()
