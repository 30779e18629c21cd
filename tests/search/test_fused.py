"""Mixed search: feedback is its formula, ends of the weights, parts that add up; reranking and diversity."""

import numpy as np
import pytest

from search.letters import corpus_of, letters, made_up
from stemma.errors import InvalidDataError
from stemma.search import Corpus, Dense, Fused, Lexical, Reranked, Rocchio, Sparse, mmr
from stemma.search.runs import mix


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "c.sqlite", made_up(150))


@pytest.fixture
def parts(corpus):
    return Lexical(corpus), Dense(corpus, letters)


QUERY = "bc d m"


def reference(corpus, query, feedback, rocchio, weight):
    """Two passes over all vectors in float64; lists have no end."""
    lexical = Lexical(corpus).ranked(query, 1000)
    vectors = letters([document.text for document in corpus])
    vectors = dict(zip([document.id for document in corpus], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))
    asked = letters([query])[0] / np.linalg.norm(letters([query])[0])

    def dense(vector):
        return {name: float(each @ vector) for name, each in vectors.items()}

    def mixed(scores):
        both = mix({"lexical": lexical, "dense": scores}, [weight, 1 - weight])
        return {name: sum(each.values()) for name, each in both.items()}

    first = dense(asked) if feedback == "after" else mixed(dense(asked))
    documents = sorted(first, key=lambda name: (-round(first[name], 9), name))[: rocchio.documents]
    moved = rocchio.alpha * asked + rocchio.beta * np.mean([vectors[name] for name in documents], axis=0)
    second = dense(moved)
    assert second == pytest.approx(  # the formula is linear
        {
            name: rocchio.alpha * (each @ asked) + rocchio.beta * np.mean([vectors[d] @ each for d in documents])
            for name, each in vectors.items()
        }
    )
    return (
        {name: sum(p.values()) for name, p in mix({"dense": second}).items()} if feedback == "before" else mixed(second)
    )


@pytest.mark.parametrize("feedback", ["before", "after", "both"])
@pytest.mark.parametrize("rocchio", [Rocchio(), Rocchio.average(3), Rocchio(documents=500)])
def test_feedback_is_its_formula(corpus, parts, feedback, rocchio):
    index = Fused(*parts, feedback=feedback, rocchio=rocchio, weights=[0.3, 0.7])
    if feedback == "before":
        index = Fused(*parts, feedback=feedback, rocchio=rocchio)
    expected = reference(corpus, QUERY, feedback, rocchio, 0.5 if feedback == "before" else 0.3)
    assert index.ranked(QUERY, 1000) == pytest.approx(expected, abs=2e-6)


def test_feedback_that_moves_nothing_is_no_feedback(parts):
    still = Rocchio(alpha=1.0, beta=0.0)
    plain = Fused(*parts).ranked(QUERY, 50)
    assert plain == Fused(*parts, feedback="both", rocchio=still).ranked(QUERY, 50)
    assert plain == Fused(*parts, feedback="after", rocchio=still).ranked(QUERY, 50)
    assert plain != Fused(*parts, feedback="both").ranked(QUERY, 50)
    assert Rocchio.average(3) == Rocchio(documents=3, alpha=0.25, beta=0.75)


def test_weights_of_one_and_zero_keep_the_order_of_one_index(parts):
    lexical, dense = parts
    assert list(Fused(*parts, weights=[0, 1]).ranked(QUERY, 1000)) == list(dense.ranked(QUERY, 1000))
    assert list(Fused(*parts, weights=[1, 0]).ranked(QUERY, 40)) == list(lexical.ranked(QUERY, 40))


@pytest.mark.parametrize("weights", ["linear", "rrf", [0.2, 0.5, 0.3]])
def test_parts_add_up_to_the_score(corpus, parts, weights):
    index = Fused(
        *parts, Sparse(corpus, letters, terms=lambda n: [f"<{i}>" for i in n]), weights=weights, feedback="both"
    )
    hits = index.search(QUERY, k=8)
    assert {hit.id: hit.score for hit in hits} == index.ranked(QUERY, 8)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.score == sum(hit.parts.values())
        assert set(hit.parts) == {"lexical", "dense", "sparse"}
    assert set(hits[0].matched) & {"bc", "d", "m"}
    assert any(word.startswith("<") for word in hits[0].matched)


def test_what_is_within_is_found_alone(parts):
    within = {f"d{number:04}" for number in range(0, 150, 10)}
    for feedback in (None, "before", "after", "both"):
        found = Fused(*parts, feedback=feedback).ranked(QUERY, 100, within)
        assert found.keys() == within
    assert Fused(*parts).ranked(QUERY, 3, []) == {}


def test_a_query_without_known_words_is_answered_by_vectors(parts):
    assert list(Fused(*parts, feedback="both").ranked("zzzm", 5))
    with pytest.raises(InvalidDataError, match="the query is empty"):
        Fused(*parts).search("\n")


def test_an_empty_corpus_finds_nothing(tmp_path):
    corpus = Corpus.open(tmp_path / "c.sqlite")
    for feedback in (None, "before", "after", "both"):
        assert Fused(Lexical(corpus), Dense(corpus, letters), feedback=feedback).search("b") == []


def test_what_cannot_be_mixed_is_refused(corpus, parts, tmp_path):
    lexical = parts[0]
    with pytest.raises(ValueError, match="each with a name of its own"):
        Fused(lexical, Lexical(corpus))
    with pytest.raises(ValueError, match="of one corpus"):
        Fused(lexical, Dense(Corpus.open(tmp_path / "other.sqlite"), letters))
    with pytest.raises(ValueError, match="feedback must be"):
        Fused(*parts, feedback="twice")
    with pytest.raises(ValueError, match="add a Dense one"):
        Fused(lexical, feedback="both")
    with pytest.raises(ValueError, match="3 weights for 2 lists"):
        Fused(*parts, weights=[1, 1, 1])
    with pytest.raises(ValueError, match="documents must be at least 1"):
        Rocchio(documents=0)


def test_reranking_orders_the_first_documents_anew(parts):
    index = Fused(*parts)
    first = list(index.ranked(QUERY, 20))
    by_length = Reranked(index, lambda query, texts: [len(text) for text in texts], depth=20)
    lengths = {document.id: len(document.text) for document in index.corpus}
    assert list(by_length.ranked(QUERY, 50)) == sorted(first, key=lambda name: (-lengths[name], name))
    (hit, *_) = by_length.search(QUERY, 1)
    assert (hit.score, hit.parts, hit.matched) == (
        lengths[hit.id],
        {"reranked": hit.score},
        index.matched(QUERY, [hit.id])[hit.id],
    )

    class CrossEncoder:
        def predict(self, pairs):
            return np.array([-len(text) for query, text in pairs if query == QUERY], np.float32)

    assert next(iter(Reranked(index, CrossEncoder(), depth=20).ranked(QUERY, 20))) == min(
        first, key=lambda n: (lengths[n], n)
    )
    with pytest.raises(InvalidDataError, match="gave 1 scores for 20 texts"):
        Reranked(index, lambda query, texts: [0.0], depth=20).ranked(QUERY, 5)


def test_diversity_is_a_greedy_choice(parts):
    scores = parts[1].ranked(QUERY, 12)
    vectors = parts[1].vectors(scores)
    assert mmr(scores, vectors, 12, trade_off=1) == list(scores)
    chosen, rows = mmr(scores, vectors, 5, trade_off=0.6), {name: row for row, name in enumerate(scores)}
    low, high = min(scores.values()), max(scores.values())
    for place, name in enumerate(chosen):
        before = [vectors[rows[each]] for each in chosen[:place]]
        value = {
            each: 0.6 * (scores[each] - low) / (high - low)
            - 0.4 * max([0.0, *(float(vectors[rows[each]] @ vector) for vector in before)])
            for each in scores
            if each not in chosen[:place]
        }
        assert value[name] == pytest.approx(max(value.values()), abs=1e-6)
    twice = {"a": 1.0, "b": 0.99, "c": 0.5}
    assert mmr(twice, np.array([[1.0, 0], [1, 0], [0, 1]]), 2, trade_off=0.5) == ["a", "c"]
    with pytest.raises(ValueError, match="trade_off must be from 0 to 1"):
        mmr(twice, np.eye(3), 2, trade_off=2)
