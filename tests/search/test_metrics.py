"""Measures equal `ir-measures` where it is installed, and values by hand; the test between runs tries all signs."""

import itertools
import math
import random

import pytest

from stemma.errors import InvalidDataError
from stemma.search.metrics import Evaluation, compare, evaluate

NAMES = [
    "nDCG",
    "nDCG@1",
    "nDCG@3",
    "nDCG@10",
    "AP",
    "AP@5",
    "RR",
    "P@1",
    "P@5",
    "P@200",
    "R@3",
    "R@50",
    "Success@2",
    "Bpref",
]
HAND = {"q": {"a": 2, "b": 0, "c": 1, "x": 1, "n": -1}, "r": {"z": 1}, "s": {"y": 0}}
RUN = {"q": {"n": 5.0, "b": 4.0, "a": 3.0, "u": 2.0, "c": 1.0}, "s": {"y": 1.0}, "t": {"a": 1.0}}


def test_values_by_hand():
    """Query q: ranked n (-1), b (0), a (2), u (not judged), c (1); x is missing. R = 3, N = 1."""
    found = evaluate(HAND, RUN, ["nDCG@3", "AP", "RR", "P@5", "R@3", "Bpref", "Success@2"])
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert {measure: values["q"] for measure, values in found.values.items()} == pytest.approx(
        {
            "nDCG@3": (2 / 2) / ideal,
            "AP": (1 / 3 + 2 / 5) / 3,
            "RR": 1 / 3,
            "P@5": 2 / 5,
            "R@3": 1 / 3,
            "Bpref": (1 - 1 / 1) * 2 / 3,
            "Success@2": 0.0,
        }
    )
    assert {values[query] for values in found.values.values() for query in "rs"} == {0.0}
    assert (found.missing, found.unjudged) == (("r",), ("t",))
    assert found.means["RR"] == pytest.approx(1 / 9)


def made_up_case(seed):
    """Judgements and a run with ties, near ties, queries that either lacks, and queries without relevant documents."""
    generator = random.Random(seed)
    documents = [f"d{number}" for number in range(60)]
    qrels, run = {}, {}
    for number in range(12):
        judged = generator.sample(documents, generator.randint(1, 40))
        grades = [0] if number == 3 else [-1, 0, 0, 1, 1, 2, 3]
        qrels[f"q{number}"] = {name: generator.choice(grades) for name in judged}
        found = generator.sample(documents, generator.randint(1, 50))
        if number != 5:
            values = [1.0, 0.5, 0.5 + 1e-9, 0.25, -3.0, generator.random(), 1 / 3, 1e30]
            run[f"q{number}"] = {name: generator.choice(values) for name in found}
    return qrels, run | {"unjudged": {"d1": 1.0}}


@pytest.mark.parametrize("seed", range(20))
def test_measures_are_those_of_ir_measures(seed):
    ir_measures = pytest.importorskip("ir_measures")
    qrels, run = made_up_case(seed)
    measures = [ir_measures.parse_measure(name) for name in NAMES]
    found = evaluate(qrels, run, NAMES)
    expected = {(str(each.measure), each.query_id): each.value for each in ir_measures.iter_calc(measures, qrels, run)}
    assert {(name, q): v for name, values in found.values.items() for q, v in values.items()} == pytest.approx(
        expected, abs=1e-9
    )
    means = {str(measure): value for measure, value in ir_measures.calc_aggregate(measures, qrels, run).items()}
    assert found.means == pytest.approx(means, abs=1e-9)


def test_reciprocal_rank_with_a_cut_off():
    """`ir-measures` takes RR@k from another program, which orders ties otherwise: compared without ties."""
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    assert evaluate({"q": {"c": 1}}, run, ["RR@2", "RR@3", "MRR", "MAP"]).means == {
        "RR@2": 0.0,
        "RR@3": 1 / 3,
        "MRR": 1 / 3,
        "MAP": 1 / 3,
    }


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(
        InvalidDataError, match=r"no query of the run is judged: it has \['2'\], the judgements \['1'\]"
    ):
        evaluate({"1": {"a": 1}}, {"2": {"a": 1.0}})
    for name in ("nDCG@0", "P", "R", "Bpref@3", "F1", "nDCG@", "", "Success"):
        with pytest.raises(ValueError, match=f"unknown measure '{name}'"):
            evaluate({"1": {"a": 1}}, {"1": {"a": 1.0}}, [name])


def evaluation(values):
    return Evaluation({"AP": {f"q{number}": value for number, value in enumerate(values)}}, (), ())


def test_p_is_the_share_of_sign_patterns_that_differ_as_much():
    generator = random.Random(0)
    for count in (1, 2, 7, 8, 9, 13):
        one = [generator.choice([0.0, 0.5, 1.0]) for _ in range(count)]
        two = [generator.choice([0.0, 0.5, 1.0]) for _ in range(count)]
        differences = [a - b for a, b in zip(one, two)]
        sums = [
            abs(sum(s * d for s, d in zip(signs, differences))) for signs in itertools.product((1, -1), repeat=count)
        ]
        expected = sum(each >= abs(sum(differences)) - 1e-9 for each in sums) / len(sums)
        found = compare(evaluation(one), evaluation(two), "AP")
        assert found.p == pytest.approx(expected, abs=1e-12)
        assert found.difference == pytest.approx(sum(differences) / count)
        assert found.queries == count


def test_drawn_patterns_come_near_all_patterns():
    generator = random.Random(1)
    one, two = ([generator.random() + shift for _ in range(16)] for shift in (0.15, 0))
    exact = compare(evaluation(one), evaluation(two), "AP").p
    padded = compare(evaluation([*one, 0.0]), evaluation([*two, 0.0]), "AP").p  # a 17th that differs by nothing
    assert 0.01 < exact < 0.5
    assert padded == pytest.approx(exact, abs=0.01)
    assert compare(evaluation([1.0] * 40), evaluation([0.0] * 40), "AP", draws=999).p == 1 / 1000
    assert compare(evaluation([1.0] * 40), evaluation([1.0] * 40), "AP", draws=999).p == 1.0


def test_other_queries_are_not_compared():
    with pytest.raises(InvalidDataError, match="do not hold AP for the same queries"):
        compare(evaluation([1.0]), evaluation([1.0, 0.0]), "AP")
    with pytest.raises(InvalidDataError, match="do not hold RR"):
        compare(evaluation([1.0]), evaluation([1.0]), "RR")
