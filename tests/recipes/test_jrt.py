"""The reproduction of Just read twice: its tasks, its controls, and that it runs and resumes."""

import json

import pytest
import torch

from stemma.recipes import jrt
from stemma.recipes._runs import Options
from stemma.recipes.jrt import Disjointness, Recall, Setting, prefill_flops, rows_for
from stemma.train.seeds import stream


def test_two_sets_have_the_answer_in_common_and_nothing_else():
    task = Disjointness(short=2, long=5, words=9)
    for examples in task.draw(400, stream(0, "test")):
        split = 2 if examples.kind == "short first" else 5
        for row, label in zip(examples.context.tolist(), examples.labels[:, 0].tolist(), strict=True):
            first, second = set(row[:split]), set(row[split + 1 :])
            assert (len(first), len(second)) == (split, 7 - split)
            assert first & second == {label}
        assert len(examples.labels.unique()) == 9


def test_queries_are_answered_by_the_context():
    (examples,) = Recall(pairs=5, queries=3, words=7).draw(50, stream(0, "test"))
    for context, question, labels in zip(
        examples.context.tolist(), examples.question.tolist(), examples.labels.tolist(), strict=True
    ):
        values = dict(zip(context[::2], context[1::2], strict=True))
        assert len(values) == 5
        assert [values[key] for key in question[::2]] == labels[::2] == question[1::2]
        assert set(labels[1::2]) == {-100}


def test_a_prompt_read_twice_has_its_context_twice_and_the_same_question():
    (examples,) = Recall().draw(2, stream(0, "test"))
    once, labels, prefix = rows_for("causal", examples)
    twice, repeated, longer = rows_for("JRT-Prompt", examples)
    assert longer == 2 * prefix + 1
    assert torch.equal(twice[:, :prefix], twice[:, prefix + 1 : longer])
    assert torch.equal(twice[:, longer:], once[:, prefix:])
    assert torch.equal(repeated[:, longer:], labels[:, prefix:])
    assert (labels != -100).sum() == (repeated != -100).sum() == examples.labels.ge(0).sum()


@pytest.mark.parametrize("feature_dim", [2, 6])
def test_methods_have_as_many_parameters(feature_dim):
    setting, task = Setting(), Recall()
    counts = [
        setting.model(method, feature_dim, task, 0).num_parameters() for method in ("causal", "JRT-RNN", "softmax")
    ]
    assert max(counts) - min(counts) <= 4 * 3 * setting.hidden_size  # one unit of width in every layer


def test_flops_grow_with_the_square_and_with_the_length():
    sizes = {"heads": 2, "head_dim": 8, "feature_dim": 2, "chunk": 4}
    assert prefill_flops("softmax", 200, **sizes) == 4 * prefill_flops("softmax", 100, **sizes)
    assert prefill_flops("JRT-RNN", 200, **sizes) == 2 * prefill_flops("JRT-RNN", 100, **sizes)


def test_the_reproduction_runs_and_resumes(tmp_path, capsys):
    options = Options(output_dir=tmp_path, quick=True)
    result = jrt.run(options)
    methods = {"causal", "JRT-Prompt", "JRT-RNN", "softmax"}
    assert {row["method"] for row in result["measurements"]} == methods
    claims = [row for row in result["measurements"] if row["claim"]]
    assert len(claims) == 7
    assert json.loads((tmp_path / "quick" / "jrt.json").read_text())["recipe"] == "jrt"
    assert (tmp_path / "quick" / "jrt.png").stat().st_size > 10_000
    assert "accuracy, set disjointness, short first" in (tmp_path / "quick" / "jrt.md").read_text()
    capsys.readouterr()
    again = jrt.run(options)
    assert capsys.readouterr().err.count("finished before") == 2 * 4 + 1
    assert again["measurements"] == result["measurements"]
