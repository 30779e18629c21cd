"""Verified solutions of problems as token ids, one JSON object per problem in a JSON Lines file.

    {"prompt_ids": [7, 2], "trace_ids": [9, 4, 1], "text": "…", "verified": true, "source": "…", "samples": 64,
     "tokens": 4711, "flops": 1.9e12, "columns": {"answer": "72"}}

`trace_ids` are what the model emitted, end-of-sequence token included, and never pass through text again; `text` is the
same decoded, to read and as a check that the tokenizer is the one that made the ids. A problem that was given up has
no `trace_ids` and `verified` false, so that a resumed collection does not try it again. Only `prompt_ids`, `trace_ids`
and `verified` are required: the file may as well come from another model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from stemma.data.records import read_jsonl
from stemma.errors import InvalidDataError

__all__ = ["Trace", "TraceFile", "read_traces", "totals"]


@dataclass(frozen=True, slots=True)
class Trace:
    """A problem and the first solution that was found, if any."""

    prompt_ids: list[int]
    """Token ids of the problem."""
    trace_ids: list[int]
    """Token ids of the solution with its end-of-sequence token; empty where none was found."""
    verified: bool
    """Whether the verifier accepts the solution."""
    text: str | None = None
    """The solution decoded without special tokens."""
    source: str = ""
    """Where the solution comes from: model and sampling options."""
    samples: int = 0
    """Completions of this problem that were sampled to find it."""
    tokens: int = 0
    """Tokens of those completions."""
    flops: float = 0.0
    """Estimated floating-point operations of sampling them: 2 × parameters × tokens, each prompt once per round."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the problem's row, for its verifier."""

    @property
    def solved(self) -> bool:
        """Whether there is a solution, verified or not."""
        return bool(self.trace_ids)


def totals(traces: Sequence[Trace]) -> dict[str, float]:
    """What a collection cost and found: problems, solved, samples, tokens, flops."""
    return {
        "problems": len(traces),
        "solved": sum(trace.solved and trace.verified for trace in traces),
        "samples": sum(trace.samples for trace in traces),
        "tokens": sum(trace.tokens for trace in traces),
        "flops": sum(trace.flops for trace in traces),
    }


def read_traces(path: str | os.PathLike[str], *, tokenizer: Any = None) -> list[Trace]:
    """The traces of a file, in its order.

    Args:
        tokenizer: the tokenizer that the ids belong to; checks them against it.

    Raises:
        InvalidDataError: names the file and the line: not JSON, a field that is missing or of another type; with a
            tokenizer also an id outside its vocabulary, a `text` that the ids do not decode to, or an end-of-sequence
            token before the end of a trace.
    """
    traces = []
    for number, record in read_jsonl(path):
        trace = _parse(f"{path}, line {number}", record)
        if tokenizer is not None:
            _check_ids(f"{path}, line {number}", trace, tokenizer)
        traces.append(trace)
    return traces


class TraceFile:
    """A trace file that grows one whole line at a time.

    A last line that a kill cut off is dropped on opening; `traces` are the ones before it.

    Args:
        path: made when it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise InvalidDataError(f"cannot write {path}: {error.strerror}; choose another path") from error
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        self.traces: list[Trace] = read_traces(self.path) if content[:whole].strip() else []

    def append(self, trace: Trace) -> None:
        """Write one trace and hand it to the operating system.

        Raises:
            InvalidDataError: a column is not JSON data.
        """
        try:
            line = json.dumps(asdict(trace), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidDataError(
                f"the columns {sorted(trace.columns)} of a problem cannot be written to {self.path} ({error}); keep "
                "text, numbers, lists and objects of them"
            ) from error
        self._file.write(line.encode("utf-8") + b"\n")
        self._file.flush()
        self.traces.append(trace)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _parse(where: str, record: Mapping[str, Any]) -> Trace:
    def wrong(name: str, expected: str) -> InvalidDataError:
        found = f"got {str(record[name])[:60]}" if name in record else f"it is missing; found {sorted(record)}"
        return InvalidDataError(f"{where}: '{name}' must be {expected}; {found}")

    for name in ("prompt_ids", "trace_ids"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise wrong(name, "a list of token ids")
    if not record["prompt_ids"]:
        raise wrong("prompt_ids", "a list of at least one token id")
    if not isinstance(record.get("verified"), bool):
        raise wrong("verified", "true or false: whether the verifier accepts the trace")
    if record["verified"] and not record["trace_ids"]:
        raise wrong("trace_ids", "the accepted solution where 'verified' is true")
    for name, kind, expected in (
        ("text", str | None, "text or null"),
        ("source", str, "text"),
        ("samples", int, "a whole number"),
        ("tokens", int, "a whole number"),
        ("flops", float | int, "a number"),
        ("columns", dict, "an object"),
    ):
        if name in record and (not isinstance(record[name], kind) or isinstance(record[name], bool)):
            raise wrong(name, expected)
    unknown = sorted(set(record) - set(Trace.__dataclass_fields__))
    if unknown:
        raise InvalidDataError(f"{where}: unknown field '{unknown[0]}'; put a problem's own columns into 'columns'")
    return Trace(**record)


def _check_ids(where: str, trace: Trace, tokenizer: Any) -> None:
    for name in ("prompt_ids", "trace_ids"):
        outside = [token for token in getattr(trace, name) if token >= len(tokenizer)]
        if outside:
            raise InvalidDataError(
                f"{where}: '{name}' holds token id {outside[0]}, outside the tokenizer's vocabulary of "
                f"{len(tokenizer)}; the trace was made with another tokenizer"
            )
    if tokenizer.eos_token_id in trace.trace_ids[:-1]:
        raise InvalidDataError(
            f"{where}: 'trace_ids' go on after the end-of-sequence token {tokenizer.eos_token_id}; cut them off there"
        )
    if trace.text is not None and tokenizer.decode(trace.trace_ids, skip_special_tokens=True) != trace.text:
        raise InvalidDataError(
            f"{where}: 'trace_ids' do not decode to 'text' ({trace.text[:40]!r}…); the trace was made with another "
            "tokenizer: encode the text anew, end-of-sequence token included"
        )
