"""Sparse search: equal to a full product for every kind of matrix; terms explain the hits."""

import numpy as np
import pytest

from search.letters import ALPHABET, corpus_of, letters, made_up
from stemma.errors import InvalidDataError
from stemma.search.corpus import Corpus
from stemma.search.sparse import Sparse


def names(numbers):
    return [ALPHABET[number] for number in numbers]


def as_scipy(texts):
    return pytest.importorskip("scipy.sparse").csr_array(letters(texts))


def as_scipy_with_doubles(texts):
    """Every count as two entries of one place."""
    whole = pytest.importorskip("scipy.sparse").coo_array(letters(texts))
    twice = [np.concatenate([each, each]) for each in whole.coords]
    return type(whole)((np.concatenate([whole.data / 2] * 2), tuple(twice)), shape=whole.shape)


def as_torch(texts):
    return pytest.importorskip("torch").tensor(letters(texts)).to_sparse()


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "c.sqlite", [*made_up(90), {"id": "nothing", "text": "xyz"}, *made_up(30, 1, 90)])


@pytest.mark.parametrize("encoder", [letters, as_scipy, as_scipy_with_doubles, as_torch])
def test_hits_are_those_of_a_full_product(corpus, encoder):
    index = Sparse(corpus, encoder)
    ids = [document.id for document in corpus]
    vectors = letters([document.text for document in corpus])
    for query in ("bbc", "m", "k k d f", "b" * 30):
        products = dict(zip(ids, (vectors @ letters([query])[0]).tolist()))
        expected = sorted(((n, p) for n, p in products.items() if p > 0), key=lambda item: (-item[1], item[0]))
        assert list(index.ranked(query, 1000).items()) == expected
        assert list(index.ranked(query, 7).items()) == expected[:7]
        within = {name for name, _ in expected[1::3]}
        assert list(index.ranked(query, 4, within).items()) == [item for item in expected if item[0] in within][:4]
    assert index.ranked("xyz", 3) == {}


def test_contributions_add_up_and_name_the_terms(corpus):
    index = Sparse(corpus, letters, terms=names)
    for hit in index.search("bbcm", k=5):
        (parts,) = index.contributions("bbcm", [hit.id]).values()
        assert sum(parts.values()) == hit.score
        assert list(parts.values()) == sorted(parts.values(), reverse=True)
        assert hit.matched == tuple(names(parts))
        assert set(hit.matched) <= set("bcm") & set(hit.text)
    assert Sparse(corpus, letters).search("b")[0].matched == ()


def test_whole_and_in_pieces_are_equal_to_the_bit(corpus, tmp_path):
    documents = [{"id": document.id, "text": document.text} for document in corpus]
    pieces = corpus_of(tmp_path / "p.sqlite", documents[:1])
    index = Sparse(pieces, letters)
    for begin, end in ((1, 50), (50, 121)):
        pieces.add(documents[begin:end])
        index.ranked("b", 1)
    whole = Sparse(corpus, letters)
    for name in ("terms.bin", "weights.bin", "ends.bin", "numbers.bin"):
        assert (index.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert index.ranked("bcd", 50) == whole.ranked("bcd", 50)
    pieces.remove(["d0000", "d0050"])
    pieces.add([{"id": "new", "text": "bbbbbbbbbbbbbbbbbbbbbb"}])
    assert list(index.ranked("b", 1)) == ["new"]
    assert not {"d0000", "d0050"} & index.ranked("bcdfghkm", 1000).keys()


def test_pruning_keeps_the_largest_and_of_equal_ones_the_first(tmp_path):
    corpus = corpus_of(tmp_path / "c.sqlite", [{"id": "a", "text": "mmm bb cc dd"}, {"id": "b", "text": "k"}])
    index = Sparse(corpus, letters, top_k=2, terms=names)
    assert index.search("mbcdk")[0].matched == ("m", "b")
    assert index.ranked("mbcdk", 2) == {"a": 5.0, "b": 1.0}
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Sparse(corpus, letters, top_k=0)
    with pytest.raises(InvalidDataError, match="made with top_k = 2, now it is None"):
        Sparse(corpus, letters)


def test_other_encoders_and_bad_matrices_are_refused(corpus):
    Sparse(corpus, letters)
    with pytest.raises(InvalidDataError, match="made by another encoder"):
        Sparse(corpus, lambda texts: letters(texts)[:, ::-1])
    with pytest.raises(InvalidDataError, match="made with vocabulary = 8, now it is 5"):
        Sparse(corpus, lambda texts: letters(texts)[:, :5])
    for encoder, complaint in (
        (lambda texts: letters(texts)[0], r"a matrix of shape \(8,\) for 121 texts"),
        (lambda texts: letters(texts)[1:], r"a matrix of shape \(120, 8\) for 121 texts"),
        (lambda texts: np.where(letters(texts) > 2, np.inf, letters(texts)), "vector of text .* is not finite"),
    ):
        with pytest.raises(InvalidDataError, match=complaint):
            Sparse(corpus, encoder, name="bad")


def test_an_empty_corpus_finds_nothing(tmp_path):
    index = Sparse(Corpus.open(tmp_path / "c.sqlite"), letters)
    assert index.search("b") == []
    index.corpus.add([{"id": "zero", "text": "xyz"}])
    assert index.search("b") == []
    assert index.contributions("b", ["zero"]) == {"zero": {}}
