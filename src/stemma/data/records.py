"""Prompt records from JSON Lines files, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from stemma.errors import InvalidDataError

__all__ = ["PromptRecord", "read_jsonl", "read_prompts", "text_field"]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt as text; None where it has no answer for a verifier to compare with, or no demonstration."""

    prompt: str
    answer: str | None = None
    demonstration: str | None = None


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file (UTF-8) with their line numbers from 1; blank lines are skipped.

    Raises:
        InvalidDataError: the file cannot be opened or holds no object, or a line is not a JSON object.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                found = True
                yield number, _parse_line(path, number, line)
    except OSError as error:
        raise InvalidDataError(f"cannot read {path}: {error.strerror}; pass the path of a JSON Lines file") from error
    if not found:
        raise InvalidDataError(f"{path} is empty; expected one JSON object on each line")


def text_field(path: str | PathLike[str], number: int, record: dict[str, Any], name: str) -> str:
    """The non-empty text of field `name`.

    Raises:
        InvalidDataError: the field is missing, not text, or blank.
    """
    if name not in record:
        raise InvalidDataError(f"{path}, line {number}: field '{name}' is missing; found {sorted(record) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise InvalidDataError(f"{path}, line {number}: field '{name}' must be text, got {type(value).__name__}")
    if not value.strip():
        raise InvalidDataError(f"{path}, line {number}: field '{name}' is blank; fill it in or remove the line")
    return value


def read_prompts(path: str | PathLike[str]) -> list[PromptRecord]:
    """Records with a field `prompt` and, where present and not null, fields `answer` and `demonstration`, all text.

    Raises:
        InvalidDataError: see `read_jsonl` and `text_field`.
    """

    def optional(number: int, record: dict[str, Any], name: str) -> str | None:
        return None if record.get(name) is None else text_field(path, number, record, name)

    return [
        PromptRecord(
            prompt=text_field(path, number, record, "prompt"),
            answer=optional(number, record, "answer"),
            demonstration=optional(number, record, "demonstration"),
        )
        for number, record in read_jsonl(path)
    ]


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))  # with its end, a cut-off line fails on the next one
    except UnicodeDecodeError as error:
        raise InvalidDataError(
            f"{path}, line {number}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidDataError(
            f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
            "expected one JSON object on each line"
        ) from None
    if not isinstance(record, dict):
        raise InvalidDataError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
    return record
