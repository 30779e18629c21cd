"""Runs: mixing against its definition, and TREC files that come back as they went."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.errors import InvalidDataError
from stemma.search.runs import best, best_rows, fuse, mix, normalized, read_qrels, read_run, write_run

SCORES = st.dictionaries(st.sampled_from("abcdef"), st.floats(-5, 5).map(lambda x: round(x, 1)), max_size=6)


def totals(mixed):
    return {name: sum(parts.values()) for name, parts in mixed.items()}


def reference_linear(lists, weights):
    """A document that a list lacks counts as its lowest one."""
    scaled = []
    for scores in lists:
        low, high = min(scores.values(), default=0), max(scores.values(), default=0)
        scaled.append({name: (score - low) / (high - low) if high > low else 1.0 for name, score in scores.items()})
    documents = {name for scores in lists for name in scores}
    return {
        name: sum(w * (each.get(name, min(each.values())) if each else 0) for w, each in zip(weights, scaled))
        for name in documents
    }


@given(one=SCORES, two=SCORES, weight=st.sampled_from([0.0, 0.3, 1.0]))
def test_linear_mixing_is_its_definition(one, two, weight):
    mixed = mix({"one": one, "two": two}, [weight, 1 - weight])
    assert totals(mixed) == pytest.approx(reference_linear([one, two], [weight, 1 - weight]))
    assert list(mixed) == list(best(totals(mixed)))
    assert totals(mix({"one": one, "two": two})) == pytest.approx(reference_linear([one, two], [0.5, 0.5]))


@given(one=SCORES, two=SCORES)
def test_reciprocal_ranks_are_their_definition(one, two):
    def rank(scores, name):
        return sum(
            (score, name) > (scores[name], other) for other, score in scores.items() if score != scores[name]
        ) + sum(other <= name for other, score in scores.items() if score == scores[name])

    expected = {n: sum(1 / (60 + rank(each, n)) for each in (one, two) if n in each) for n in {**one, **two}}
    assert totals(mix({"one": one, "two": two}, "rrf")) == pytest.approx(expected)


def test_weights_of_one_and_zero_keep_the_order_of_one_list():
    one, two = {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 0.0, "c": 9.0, "b": 8.0}
    assert list(mix({"one": one, "two": two}, [1, 0])) == ["a", "c", "b"]
    assert list(mix({"one": one, "two": two}, [0, 1])) == ["c", "b", "a"]


def test_scores_are_normalised():
    assert normalized({"a": 3.0, "b": 1.0, "c": 2.0}) == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert normalized({"a": 3.0}) == normalized({"a": 0.0}) == {"a": 1.0}
    scaled = normalized({"a": 3.0, "b": 1.0, "c": 2.0}, "zscore")
    assert scaled == pytest.approx({"a": math.sqrt(1.5), "b": -math.sqrt(1.5), "c": 0.0})
    assert normalized({"a": 2.0, "b": 2.0}, "zscore") == {"a": 0.0, "b": 0.0}
    assert normalized({}) == {}
    with pytest.raises(InvalidDataError, match="document 'b' is nan"):
        normalized({"a": 1.0, "b": math.nan})
    with pytest.raises(ValueError, match="1 weights for 2 lists"):
        mix({"a": {}, "b": {}}, [1.0])
    with pytest.raises(ValueError, match="how must be"):
        normalized({"a": 1.0}, "softmax")


def test_runs_are_fused_query_by_query():
    one, two = {"q": {"a": 1.0, "b": 0.0}}, {"q": {"b": 5.0}, "r": {"c": 1.0}}
    assert fuse([one, two], [0.25, 0.75]) == {"q": {"a": 1.0, "b": 0.75}, "r": {"c": 0.75}}
    assert fuse([one, two], [0.25, 0.75], k=1) == {"q": {"a": 1.0}, "r": {"c": 0.75}}


def test_the_best_rows_of_an_array_are_those_of_a_dictionary():
    np = pytest.importorskip("numpy")
    scores = np.random.default_rng(0).integers(0, 6, 200).astype(np.float32)
    names = [f"n{number:03}" for number in np.random.default_rng(1).permutation(200)]
    for k in (1, 5, 60, 199, 200, 500):
        expected = best(dict(zip(names, scores.tolist())), k)
        assert list(best_rows(scores, names, k).items()) == list(expected.items())
        positive = best({name: score for name, score in zip(names, scores.tolist()) if score > 0}, k)
        assert list(best_rows(scores, names, k, above=0).items()) == list(positive.items())
    assert best_rows(np.array([-np.inf, 1.0, -np.inf]), ["a", "b", "c"], 2) == {"b": 1.0}


def test_a_run_comes_back_to_the_last_digit(tmp_path):
    run = {"q 1".replace(" ", ""): {"b": 1 / 3, "a": 1 / 3, "c": -1e-17}, "q2": {"d": 12345.6789}}
    write_run(tmp_path / "run", run, tag="t")
    assert (tmp_path / "run").read_text().splitlines()[:2] == [
        f"q1 Q0 a 1 {1 / 3!r} t",
        f"q1 Q0 b 2 {1 / 3!r} t",
    ]
    assert read_run(tmp_path / "run") == run
    with pytest.raises(InvalidDataError, match="the id 'a b' cannot stand in a TREC file"):
        write_run(tmp_path / "run", {"q": {"a b": 1.0}})
    assert read_run(tmp_path / "run") == run


@pytest.mark.parametrize(
    ("read", "text", "complaint"),
    [
        (read_run, "q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", "line 2: document 'a' comes twice for query 'q'"),
        (read_run, "\nq Q0 a 1 0.5\n", "line 2: expected 'query Q0 document rank score tag', got 'q Q0 a 1 0.5'"),
        (read_run, "q Q0 a 1 nan t\n", "line 1: the score must be a finite number, got 'nan'"),
        (read_run, "q Q0 a 1 high t\n", "line 1: the score must be a finite number, got 'high'"),
        (read_run, " \n", "is empty"),
        (read_qrels, "q 0 a 1\nq 0 a 2\n", "line 2: document 'a' has two grades for query 'q'"),
        (read_qrels, "q 0 a 0.5\n", "line 1: the grade must be a whole number, got '0.5'"),
        (read_qrels, "q 0 a\n", "line 1: expected 'query iteration document grade'"),
    ],
)
def test_bad_lines_are_named(tmp_path, read, text, complaint):
    (tmp_path / "file").write_text(text)
    with pytest.raises(InvalidDataError, match=complaint):
        read(tmp_path / "file")


def test_judgements_are_read(tmp_path):
    (tmp_path / "qrels").write_bytes("\ufeffq\t0\ta\t1\r\nq 0 a 1\n\nr 0 ü -1\n".encode())
    assert read_qrels(tmp_path / "qrels") == {"q": {"a": 1}, "r": {"ü": -1}}
    with pytest.raises(InvalidDataError, match="cannot read"):
        read_qrels(tmp_path / "none")
