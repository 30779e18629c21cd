"""The trace file: what is read is what was written, a cut-off line costs one trace, wrong lines are named."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.data import diallock
from stemma.data.traces import Trace, TraceFile, read_traces, totals
from stemma.errors import InvalidDataError

IDS = st.lists(st.integers(0, 10**6), min_size=1, max_size=5)
COLUMNS = st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=8) | st.integers() | IDS, max_size=3)
SOLVED = st.builds(
    Trace,
    prompt_ids=IDS,
    trace_ids=IDS,
    verified=st.booleans(),
    text=st.none() | st.text(max_size=8),
    source=st.text(max_size=8),
    samples=st.integers(0, 2500),
    tokens=st.integers(0, 10**9),
    flops=st.floats(0, 1e20),
    columns=COLUMNS,
)
GIVEN_UP = st.builds(Trace, prompt_ids=IDS, trace_ids=st.just([]), verified=st.just(False), columns=COLUMNS)


def good(**changes: Any) -> dict[str, Any]:
    """A line of the file: DialLock's `10>11:` solved by `a11>11.`; a value None removes the field."""
    episode = diallock.oracle_episode(diallock.Problem(10, 11), Random(0))
    record = {
        "prompt_ids": episode.prompt_ids,
        "trace_ids": episode.completion_ids,
        "verified": True,
        "text": episode.completion,
    }
    return {name: value for name, value in {**record, **changes}.items() if value is not None}


@given(st.lists(SOLVED | GIVEN_UP, min_size=1, max_size=4))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, traces: list[Trace]) -> None:
    path = tmp_path_factory.mktemp("traces") / "new" / "traces.jsonl"
    with TraceFile(path) as file:
        for trace in traces:
            file.append(trace)
    assert read_traces(path) == traces == file.traces


@pytest.mark.parametrize("tokenizer", [None, diallock.tokenizer()])
def test_three_fields_are_enough(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"prompt_ids": [2], "trace_ids": [3, 1], "verified": True}) + "\n", encoding="utf-8")
    assert read_traces(path, tokenizer=tokenizer) == [Trace(prompt_ids=[2], trace_ids=[3, 1], verified=True)]


def test_a_cut_off_last_line_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    lines = [json.dumps(good(source=f"é{i}"), ensure_ascii=False).encode() + b"\n" for i in range(2)]
    whole = b"".join(lines)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with TraceFile(path) as file:
            kept = (size >= len(lines[0])) + (size == len(whole))
            assert [trace.source for trace in file.traces] == ["é0", "é1"][:kept]
        assert path.read_bytes() == b"".join(lines[:kept])


def test_each_trace_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with TraceFile(path) as file:
        file.append(Trace(prompt_ids=[1], trace_ids=[2], verified=True))
        assert len(read_traces(path)) == 1


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (good(prompt_ids=3), "'prompt_ids' must be a list of token ids; got 3"),
        (good(prompt_ids=[]), "'prompt_ids' must be a list of at least one token id"),
        (good(trace_ids=None), "'trace_ids' must be a list of token ids; it is missing; found"),
        (good(trace_ids=[1, 2.0]), "'trace_ids' must be a list of token ids"),
        (good(trace_ids=[1, True]), "'trace_ids' must be a list of token ids"),
        (good(trace_ids=[-1]), "'trace_ids' must be a list of token ids"),
        (good(trace_ids=[]), "'trace_ids' must be the accepted solution where 'verified' is true"),
        (good(verified=None), "'verified' must be true or false"),
        (good(verified=1), "'verified' must be true or false"),
        (good(text=4), "'text' must be text or null"),
        (good(samples="many"), "'samples' must be a whole number"),
        (good(samples=True), "'samples' must be a whole number"),
        (good(columns=[1]), "'columns' must be an object"),
        (good(answer="72"), "unknown field 'answer'; put a problem's own columns into 'columns'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(f"{json.dumps(good())}\n{json.dumps(record)}\n", encoding="utf-8")
    with pytest.raises(InvalidDataError) as error:
        read_traces(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (good(trace_ids=[3, 21, 1]), "'trace_ids' holds token id 21, outside the tokenizer's vocabulary of 21"),
        (good(prompt_ids=[999]), "'prompt_ids' holds token id 999"),
        (good(trace_ids=[3, 1, 4, 1]), "go on after the end-of-sequence token 1"),
        (good(text="b11>11."), "do not decode to 'text' ('b11>11.'…)"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(f"{json.dumps(good())}\n{json.dumps(record)}\n", encoding="utf-8")
    assert len(read_traces(path)) == 2  # nothing to compare with
    with pytest.raises(InvalidDataError, match="line 2") as error:
        read_traces(path, tokenizer=diallock.tokenizer())
    assert told in str(error.value)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"cannot read .*nowhere\.jsonl"):
        read_traces(tmp_path / "nowhere.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidDataError, match="cannot write"):
        TraceFile(tmp_path / "file" / "traces.jsonl")
    with (
        TraceFile(tmp_path / "traces.jsonl") as file,
        pytest.raises(InvalidDataError, match=r"columns \['answer'\] of a problem cannot be written"),
    ):
        file.append(Trace(prompt_ids=[1], trace_ids=[], verified=False, columns={"answer": object()}))
    assert (tmp_path / "traces.jsonl").read_bytes() == b""


def test_totals() -> None:
    traces = [
        Trace(prompt_ids=[1], trace_ids=[2], verified=True, samples=4, tokens=40, flops=1e6),
        Trace(prompt_ids=[1], trace_ids=[2], verified=False, samples=1, tokens=5),
        Trace(prompt_ids=[1], trace_ids=[], verified=False, samples=8, tokens=90, flops=2e6),
    ]
    assert totals(traces) == {"problems": 3, "solved": 1, "samples": 13, "tokens": 135, "flops": 3e6}
