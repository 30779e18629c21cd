"""Lines of JSON, and batches for commands that look at one: read from a file, or made up from three lengths."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.errors import InvalidDataError

if TYPE_CHECKING:
    from stemma.prefix.tree import PrefixTree

__all__ = ["made_up_tree", "read_lines", "read_tree"]


def read_tree(path: Path, min_shared: int = 8) -> "PrefixTree":
    """The prefix tree of a JSONL file of token ids.

    Each line is either one sequence, `[5, 9, 2]` or `{"input_ids": [5, 9, 2]}`, or one group,
    `{"prompt_ids": [5, 9], "completion_ids": [[2, 7], [4]]}`. A file holds one kind of line.

    Raises:
        InvalidDataError: unreadable file, or a line that is neither; names file and line.
    """
    from stemma.prefix.tree import PrefixTree

    sequences: list[list[int]] = []
    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    for number, record in read_lines(path):
        where = f"{path}:{number}"
        if isinstance(record, dict) and "prompt_ids" in record and "completion_ids" in record:
            prompts.append(_ids(record["prompt_ids"], where, "prompt_ids"))
            if not isinstance(record["completion_ids"], list):
                raise InvalidDataError(f"{where}: completion_ids must be a list of lists of token ids.")
            completions.append([_ids(ids, where, "completion_ids") for ids in record["completion_ids"]])
        elif isinstance(record, dict) and "input_ids" in record:
            sequences.append(_ids(record["input_ids"], where, "input_ids"))
        elif isinstance(record, list):
            sequences.append(_ids(record, where, "the line"))
        else:
            raise InvalidDataError(
                f"{where}: expected a list of token ids, an object with input_ids, or an object with prompt_ids and "
                "completion_ids."
            )
        if sequences and prompts:
            raise InvalidDataError(f"{where}: the file mixes sequences and groups; keep one kind of line in a file.")
    if prompts:
        return PrefixTree.from_groups(prompts, completions, min_shared=min_shared)
    if not sequences:
        raise InvalidDataError(f"{path} has no lines; write one sequence or group of token ids on each.")
    return PrefixTree.from_sequences(sequences, min_shared=min_shared)


def made_up_tree(
    vocab_size: int, prompt_tokens: int, response_tokens: int, group_size: int, min_shared: int
) -> "PrefixTree":
    """One prompt with `group_size` responses of equal length that differ from their first token on."""
    from stemma.prefix.tree import PrefixTree

    if group_size > vocab_size:
        raise InvalidDataError(
            f"group size {group_size} is above the vocabulary of {vocab_size} tokens, so responses cannot all "
            "differ in their first token; ask for a smaller group."
        )
    prompt = [index % vocab_size for index in range(prompt_tokens)]
    responses = [
        [member, *(index % vocab_size for index in range(response_tokens - 1))] for member in range(group_size)
    ]
    return PrefixTree.from_groups([prompt], [responses], min_shared=min_shared)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file with their line numbers from 1; blank lines are skipped.

    Raises:
        InvalidDataError: unreadable file, or a line that is not JSON; names line and column.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # and not where else a text may break a line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidDataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}).") from error


def _ids(value: Any, where: str, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InvalidDataError(f"{where}: {name} must be a list of integer token ids, got {str(value)[:60]}.")
    return value
