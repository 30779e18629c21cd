"""Batches for commands that look at one: read from a file, or made up from three lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.data.records import read_lines
from stemma.errors import InvalidDataError

if TYPE_CHECKING:
    from stemma.prefix.tree import PrefixTree

__all__ = ["Batch", "made_up_tree", "read_batch"]


@dataclass(frozen=True)
class Batch:
    """The sequences of a file: each by itself, or in groups of a prompt and its completions."""

    path: Path
    rows: dict[int, list[list[int]]]
    """By line: a sequence alone, or a prompt and its completions."""
    grouped: bool

    def check(self, model: Any) -> None:
        """Refuse what the model cannot score.

        Raises:
            InvalidBatchError: names the line of a token id outside the vocabulary, or of a sequence that is too long.
        """
        from stemma.models.limits import check_prompts

        whole = [(line, row[0] + ids) for line, row in self.rows.items() for ids in (row[1:] or [[]])]
        check_prompts(model, [ids for _, ids in whole], 0, lambda index: f"{self.path}, line {whole[index][0]}:")

    def tree(self, min_shared: int = 8) -> "PrefixTree":
        """The prefix tree of the file."""
        from stemma.prefix.tree import PrefixTree

        rows = self.rows.values()
        if not self.grouped:
            return PrefixTree.from_sequences([ids for (ids,) in rows], min_shared=min_shared)
        return PrefixTree.from_groups([row[0] for row in rows], [row[1:] for row in rows], min_shared=min_shared)


def read_batch(path: Path) -> Batch:
    """A JSONL file of token ids.

    Each line is either one sequence, `[5, 9, 2]` or `{"input_ids": [5, 9, 2]}`, or one group,
    `{"prompt_ids": [5, 9], "completion_ids": [[2, 7], [4]]}`. A file holds one kind of line.

    Raises:
        InvalidDataError: unreadable file, or a line that is neither; names file and line.
    """
    rows: dict[int, list[list[int]]] = {}
    kinds = set()
    for number, record in read_lines(path):
        where = f"{path}, line {number}"
        if isinstance(record, dict) and "prompt_ids" in record and "completion_ids" in record:
            if not isinstance(record["completion_ids"], list) or not record["completion_ids"]:
                raise InvalidDataError(f"{where}: completion_ids must be a list of lists of token ids.")
            completions = [_ids(ids, where, "completion_ids") for ids in record["completion_ids"]]
            rows[number] = [_ids(record["prompt_ids"], where, "prompt_ids"), *completions]
        elif isinstance(record, list) or (isinstance(record, dict) and "input_ids" in record):
            ids = record if isinstance(record, list) else record["input_ids"]
            rows[number] = [_ids(ids, where, "the line" if ids is record else "input_ids")]
        else:
            raise InvalidDataError(
                f"{where}: expected a list of token ids, an object with input_ids, or an object with prompt_ids and "
                "completion_ids."
            )
        kinds.add(len(rows[number]) > 1)
        if len(kinds) > 1:
            raise InvalidDataError(f"{where}: the file mixes sequences and groups; keep one kind of line in a file.")
    if not rows:
        raise InvalidDataError(f"{path} has no lines; write one sequence or group of token ids on each.")
    return Batch(path, rows, kinds.pop())


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


def _ids(value: Any, where: str, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InvalidDataError(f"{where}: {name} must be a list of integer token ids, got {str(value)[:60]}.")
    return value
