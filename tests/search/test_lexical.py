"""BM25: equal to its formula in both engines; user text is never a query language; the words that matched."""

import math
import random
import string
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.letters import corpus_of, made_up
from stemma.errors import InvalidDataError, MissingExtraError
from stemma.search.corpus import Corpus
from stemma.search.lexical import Lexical


def engine_or_skip(name):
    if name == "bm25s":
        pytest.importorskip("bm25s")
        pytest.importorskip("Stemmer")
    return name


def reference_bm25(texts, query, factor, floor):
    """The formula of the module, with the idf of the engine; `factor` is k1 + 1, or 1 where an engine leaves it out."""
    split = {name: text.lower().split() for name, text in texts.items()}
    mean = sum(map(len, split.values())) / len(split)
    scores = Counter()
    for word in query.split():
        with_word = [name for name, words in split.items() if word in words]
        inverse = math.log((len(split) - len(with_word) + 0.5) / (len(with_word) + 0.5) + (0 if floor else 1))
        inverse = max(inverse, 1e-6) if floor else inverse
        for name in with_word:
            count, length = split[name].count(word), len(split[name])
            scores[name] += inverse * count * factor / (count + 1.2 * (1 - 0.75 + 0.75 * length / mean))
    return dict(scores)


@pytest.mark.parametrize("engine", ["fts5", "bm25s"])
def test_scores_are_the_formula(tmp_path, engine):
    engine_or_skip(engine)
    records = made_up(60)
    index = Lexical(corpus_of(tmp_path / "c.sqlite", records), engine=engine)
    for query in ("b c", "d d f", "bc", "m"):
        expected = reference_bm25(
            {each["id"]: each["text"] for each in records}, query, *((2.2, True) if engine == "fts5" else (1, False))
        )
        assert index.ranked(query, 100) == pytest.approx(expected, rel=1e-5)
        ranked = list(index.ranked(query, 100).items())
        assert ranked == sorted(ranked, key=lambda item: (-item[1], item[0]))
        for k in (1, 3, 7):
            assert list(index.ranked(query, k).items()) == ranked[:k]
        within = {"d0003", "d0030", *(name for name, _ in ranked[5:9])}
        assert list(index.ranked(query, 4, within).items()) == [item for item in ranked if item[0] in within][:4]


@pytest.mark.parametrize("engine", ["fts5", "bm25s"])
def test_equal_scores_come_in_the_order_of_ids(tmp_path, engine):
    engine_or_skip(engine)
    names = [f"n{number}" for number in random.Random(0).sample(range(100, 1000), 50)]
    texts = [
        {"id": name, "text": "same words" if number % 2 else "quite other words"} for number, name in enumerate(names)
    ]
    index = Lexical(corpus_of(tmp_path / "c.sqlite", texts), engine=engine)
    assert list(index.ranked("same", 10)) == sorted(names[1::2])[:10]


@pytest.mark.parametrize("engine", ["fts5", "bm25s"])
def test_built_at_once_or_in_pieces(tmp_path, engine):
    engine_or_skip(engine)
    records = made_up(40)
    whole = Lexical(corpus_of(tmp_path / "whole.sqlite", records), engine=engine)
    pieces = Lexical(
        corpus_of(tmp_path / "pieces.sqlite", [{"id": "gone", "text": "b c d f"}, *records[:7]]), engine=engine
    )
    pieces.ranked("b", 1)
    pieces.corpus.remove(["gone"])
    pieces.corpus.add([{"id": "d0030", "text": "bc bc"}])
    pieces.corpus.add(records, update=True)
    for query in ("b", "bc d", "b c d f g h k m"):
        assert pieces.ranked(query, 100) == whole.ranked(query, 100)


HOSTILE = [
    '"',
    "AND",
    "NOT",
    "a AND",
    "NEAR(a b",
    "text:a",
    "a*",
    "^a",
    "-a",
    "(",
    "a OR )",
    "{a b}: c",
    "\x00a",
    "'; DROP TABLE",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    texts = [{"id": "a", "text": "A not quite plain text, and near it."}, {"id": "b", "text": "naïve café हिन्दी 漢字"}]
    return Lexical(corpus_of(tmp_path_factory.mktemp("c") / "c.sqlite", texts))


@given(query=st.one_of(st.sampled_from(HOSTILE), st.text(), st.text(string.punctuation + "ab ")))
def test_no_text_is_an_error(small, query):
    if query.strip():
        hits = small.search(query)
        assert all(hit.score > 0 for hit in hits)
    else:
        with pytest.raises(InvalidDataError, match="the query is empty"):
            small.search(query)


def test_words_are_what_the_index_calls_words(small):
    assert [hit.id for hit in small.search("text:quite")] == ["a"]
    assert [hit.id for hit in small.search('"near"* -plain^')] == ["a"]
    assert [hit.id for hit in small.search("CAFE")] == ["b"]
    assert [hit.id for hit in small.search("हिन्दी")] == ["b"]
    assert small.search("???") == []
    assert [hit.id for hit in small.search("not it")] == ["a"]  # nothing but stop words: they count
    assert small.search("not zebra") == []
    assert small.ranked("plain " * 3000, 5).keys() == {"a"}
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        small.search("a", k=0)


def test_the_words_that_matched(small):
    (hit,) = small.search("plains texts")
    assert hit.matched == ("plain", "text")
    assert hit.parts == {"lexical": hit.score}
    assert hit.text.startswith("A not quite")


def test_bm25s_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"stemma-lm\[search\]"):
        Lexical(Corpus.open(tmp_path / "c.sqlite"), engine="bm25s")
    with pytest.raises(ValueError, match="engine must be"):
        Lexical(Corpus.open(tmp_path / "c.sqlite"), engine="lucene")


def test_words_and_measures_need_the_standard_library_alone():
    code = (
        "import sys; from stemma.search import Corpus, Lexical, Fused, evaluate, compare, read_run; "
        "print([m for m in ('numpy', 'torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    code = code.replace("import Corpus", "import Dense, Sparse, Corpus")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['numpy']"
