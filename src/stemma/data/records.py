"""Prompt records from JSON Lines files, with errors that name the file and the line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from stemma.errors import InvalidDataError

__all__ = ["PromptRecord", "read_jsonl", "read_lines", "read_prompts", "text_field"]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt as text; None where it has no answer for a verifier to compare with, or no demonstration."""

    prompt: str
    answer: str | None = None
    demonstration: str | None = None
    where: str = field(default="", compare=False)
    """File and line that it comes from."""


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """The JSON values of a JSON Lines file (UTF-8) with their line numbers from 1; blank lines are skipped, and so is a
    byte order mark.

    Raises:
        InvalidDataError: the file cannot be read, or a line is not JSON; see `parse_json`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    # with its end, a cut-off line fails on the next one
                    yield number, parse_json(text.rstrip(b"\r\n"), f"{path}, line {number}")
    except OSError as error:
        raise InvalidDataError(f"cannot read {path}: {error.strerror}; pass the path of a JSON Lines file") from error


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, as `read_lines`.

    Raises:
        InvalidDataError: see `read_lines`; or the file holds no object, or a line something else.
    """
    number = 0
    for number, record in read_lines(path):
        if not isinstance(record, dict):
            raise InvalidDataError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record
    if not number:
        raise InvalidDataError(f"{path} is empty; expected one JSON object on each line")


def parse_json(content: bytes, where: str) -> Any:
    """The JSON value that UTF-8 text holds.

    Raises:
        InvalidDataError: it is not UTF-8 or not JSON, nested too deep, or has NaN, a number of thousands of digits, or
            half of a surrogate pair, which no tokenizer takes; begins with `where`.
    """

    def constant(name: str) -> Any:
        raise InvalidDataError(f"{where}: {name} is not JSON; write a number or null")

    try:
        value = json.loads(content.decode("utf-8"), parse_constant=constant)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except InvalidDataError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise InvalidDataError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff); remove it") from None
    except json.JSONDecodeError as error:
        raise InvalidDataError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); expected one JSON value on each line"
        ) from None
    except RecursionError:
        raise InvalidDataError(f"{where}: the JSON is nested too deep") from None
    except ValueError:  # Python's limit on the digits of a whole number
        raise InvalidDataError(f"{where}: a number has too many digits") from None


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
            where=f"{path}, line {number}",
        )
        for number, record in read_jsonl(path)
    ]
