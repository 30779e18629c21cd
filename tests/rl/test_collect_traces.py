"""Traces by rejection sampling: the first success is kept, everything is counted, interruption changes nothing."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rl.scripted import Scripted
from stemma.data import diallock
from stemma.data.traces import Trace, read_traces
from stemma.decode.rollout import LocalGenerator
from stemma.errors import InvalidDataError
from stemma.rl.engine.collect import collect_traces
from stemma.rl.prefix_rl import build_prefixed_problems

Make = Callable[..., Any]
EOS = diallock.EOS_ID


def problem_rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    drawn = diallock.draw_problems(diallock.problems("train", min_distance=3), count, Random(1))
    return [{"prompt_ids": diallock.encode(problem.prompt), **columns} for problem in drawn]


def short_answer(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rare enough for several rounds, frequent enough for most problems."""
    return [float(len(ids) in (3, 4)) for ids in completion_ids]


@pytest.fixture
def collect(make_model: Make, tmp_path: Path) -> Callable[..., list[Trace]]:
    """`collect(**changes)`: six problems with a random model, in rounds of 2, at most 7 samples, to traces.jsonl."""
    model = make_model()

    def run(problems: Any = None, verify: Any = short_answer, **changes: Any) -> list[Trace]:
        options = {
            "generator": LocalGenerator(eos_token_id=EOS),
            "processing_class": diallock.tokenizer(),
            "max_completion_length": 12,
            "samples_per_round": 2,
            "max_samples": 7,
            "path": tmp_path / "traces.jsonl",
        }
        return collect_traces(
            model, problem_rows(6) if problems is None else problems, verify, **{**options, **changes}
        )

    return run


def test_the_first_success_is_kept_and_everything_is_counted(collect: Make, make_model: Make) -> None:
    # Problem p needs 3p samples; samples are 2, 3, 4, ... tokens long, and each round starts again at 2.
    problems = problem_rows(3, answer="72")
    order = [row["prompt_ids"] for row in problems]
    sampled: list[list[int]] = []

    def says(prompt: list[int], index: int) -> list[int]:
        sampled.append(prompt)
        return [2 + sampled.count(prompt)] * (index + 1) + [EOS]

    def verify(
        prompt_ids: list[list[int]], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        assert set(answer) == {"72"}
        return [float(c[0] - 2 >= 3 * order.index(p)) for p, c in zip(prompt_ids, completion_ids)]

    generator = Scripted(says)
    traces = collect(problems, verify, generator=generator, samples_per_round=4, max_samples=5)
    assert [call[:2] for call in generator.calls] == [
        ([order[0]], 4),
        ([order[1]], 4),
        ([order[2]], 4),
        ([order[2]], 1),
    ]
    assert [trace.trace_ids for trace in traces] == [[3, EOS], [5, 5, 5, EOS], []]
    assert [(trace.verified, trace.text) for trace in traces] == [(True, "1"), (True, "333"), (False, None)]
    assert [(trace.samples, trace.tokens) for trace in traces] == [(4, 14), (4, 14), (5, 16)]
    parameters = sum(p.numel() for p in make_model().parameters())
    # 6 tokens of prompt in every round, and what was sampled.
    assert [trace.flops for trace in traces] == [2 * parameters * (6 + 14)] * 2 + [2 * parameters * (12 + 16)]
    assert all(trace.columns == {"answer": "72"} for trace in traces)


def test_an_interrupted_collection_resumes_to_the_same_file(collect: Make, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    whole = collect()
    expected = path.read_bytes()
    assert {trace.verified for trace in whole} == {True, False}, "both kinds of trace have to be in the file"
    assert len({trace.samples for trace in whole}) > 1, "several rounds have to be in it"

    rounds = sum(-(-trace.samples // 2) for trace in whole)
    for stop_after in {*range(0, rounds, 3), rounds}:
        path.unlink()
        budget = iter([False] * stop_after)
        first = collect(should_stop=lambda budget=budget: next(budget, True))
        assert first == whole[: len(first)]
        assert len(first) < len(whole) or stop_after == rounds
        assert collect() == whole
        assert path.read_bytes() == expected
    for size in range(0, len(expected), len(expected) // 4):  # killed while it wrote
        path.write_bytes(expected[:size])
        collect()
        assert path.read_bytes() == expected


def test_finished_problems_are_not_sampled_again(collect: Make, tmp_path: Path) -> None:
    never = {"verify": lambda completions, **_: [0.0] * len(completions)}
    generator = Scripted(lambda prompt, index: [3, EOS])
    seen: list[Trace] = []
    traces = collect(problem_rows(2), generator=generator, on_trace=seen.append, **never)
    assert [call[1] for call in generator.calls] == [2, 2, 2, 1] * 2
    assert len({tuple(call[2]["seed"]) for call in generator.calls}) == 8, "every round has random numbers of its own"
    assert seen == traces
    assert [(t.trace_ids, t.verified, t.samples) for t in traces] == [([], False, 7)] * 2
    assert collect(problem_rows(2), generator=generator, on_trace=seen.append, **never) == traces
    assert len(generator.calls) == 8
    assert len(seen) == 2
    with pytest.raises(InvalidDataError, match="no problem can be built from 2 traces: 2 without a success"):
        build_prefixed_problems(read_traces(tmp_path / "traces.jsonl"))


def test_a_seed_decides_the_traces_and_a_problem_does_not_depend_on_the_others(collect: Make) -> None:
    assert collect(path=None) == collect(path=None)
    assert collect(path=None) != collect(path=None, seed=1)
    assert collect(problem_rows(6)[:3], path=None) == collect(path=None)[:3]


def test_a_completion_that_was_cut_off_counts_by_its_answer(collect: Make) -> None:
    generator = Scripted(lambda prompt, index: [3, 3] if index == 0 else [4, EOS])
    traces = collect(problem_rows(1), lambda completions, **_: [1.0] * len(completions), generator=generator)
    assert traces[0].trace_ids == [3, 3]
    assert len(build_prefixed_problems(traces, ratio=(0.5, 0.5), cuts_per_problem=1)) == 2


def test_a_part_of_the_reward_is_no_success(collect: Make) -> None:
    generator = Scripted(lambda prompt, index: [3 + index, EOS])
    traces = collect(problem_rows(1), lambda completions, **_: [0.9, 1.0], generator=generator)
    assert traces[0].trace_ids == [4, EOS]


def test_a_completion_without_a_score_is_no_success(collect: Make) -> None:
    generator = Scripted(lambda prompt, index: [3 + index, EOS])
    traces = collect(problem_rows(1), lambda completions, **_: [None, 1.0], generator=generator, samples_per_round=2)
    assert traces[0].trace_ids == [4, EOS]


def test_a_failing_verifier_is_named_and_loses_nothing(collect: Make, tmp_path: Path) -> None:
    bad = problem_rows(6)[3]["prompt_ids"]

    def fails(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if prompt_ids[0] == bad:
            raise KeyError("answer")
        return short_answer(completion_ids)

    with pytest.raises(InvalidDataError, match="reward function 'fails' raised KeyError"):
        collect(verify=fails)
    assert len(read_traces(tmp_path / "traces.jsonl")) == 3


def test_a_file_of_something_else_is_not_continued(collect: Make, tmp_path: Path) -> None:
    collect(problem_rows(2), source="seed 0")
    with pytest.raises(InvalidDataError, match=r"traces\.jsonl, trace 1 was collected.*'seed 0', not 'seed 1'"):
        collect(problem_rows(2), source="seed 1")
    with pytest.raises(InvalidDataError, match=r"traces\.jsonl, trace 2 is of another problem"):
        collect([problem_rows(2)[0], problem_rows(3)[2]], source="seed 0")
    before = (tmp_path / "traces.jsonl").read_bytes()
    assert len(collect(problem_rows(1), source="seed 0")) == 1  # fewer problems: the file keeps the others
    assert (tmp_path / "traces.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"samples_per_round": 0}, ValueError, "samples_per_round must be at least 1"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1"),
        ({"problems": [{"prompt_ids": [2, 3], "prefix_ids": [3]}]}, InvalidDataError, "problem 0 has prefix_ids"),
    ],
)
def test_bad_requests_are_refused(collect: Make, changes: dict, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        collect(**changes)
