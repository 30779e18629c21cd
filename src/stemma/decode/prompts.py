"""The prompts of a call of `stemma.generate`, as token ids."""

from collections.abc import Mapping, Sequence
from operator import index as index_of
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stemma.errors import InvalidBatchError
from stemma.models.tokens import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "as_list", "pad_left", "prompt_ids", "without_padding"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""


def as_list(prompts: Any) -> list[Any]:
    """The prompts, unless they are a single one.

    Raises:
        InvalidBatchError: they are, or there is none.
    """
    single = isinstance(prompts, (str, bytes, Mapping))
    listed = [] if single else list(prompts)
    if single or (listed and all(map(_is_item, listed))):
        raise InvalidBatchError(f"prompts is a list of prompts; write [prompt] for a single one, got {prompts!r:.60}.")
    if not listed:
        raise InvalidBatchError("there are no prompts; give at least one.")
    return listed


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase | None", prompt: Prompt, index: int = 0, continues: bool = False
) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: needed for texts and messages.
        prompt: text, messages or ids.
        index: its number, for messages of errors.
        continues: it follows a prefix, so a text gets no special tokens.

    Raises:
        InvalidBatchError: an empty prompt, a text or messages without a tokenizer, messages that its chat template does
            not take or that follow a prefix, or something else.
    """
    ids: Any = prompt
    if isinstance(prompt, str) or (not _is_item(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise InvalidBatchError(f"prompt {index} is text, which needs a tokenizer; give one, or token ids.")
        if isinstance(prompt, str):
            ids = text_ids(tokenizer, prompt, special_tokens=not continues)
        elif continues:
            raise InvalidBatchError(
                f"prompt {index} is chat messages, whose template begins anew, and cannot follow a prefix; apply the "
                "template and give the token ids behind the prefix."
            )
        else:
            ids = _chat_ids(tokenizer, prompt, index)
    try:
        found = [index_of(token) for token in ids]
    except (TypeError, ValueError):
        raise InvalidBatchError(
            f"prompt {index} must be a text, a list of token ids or a list of chat messages, got {str(prompt)[:60]!r}."
        ) from None
    if not found:
        raise InvalidBatchError(f"prompt {index} is empty; generation needs at least one token to start from.")
    return found


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], index: int) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidBatchError(
            f"prompt {index} is chat messages, and the tokenizer has no chat template; set tokenizer.chat_template, or "
            "give texts."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template raises what it likes
        reason = str(error).strip().partition("\n")[0]
        raise InvalidBatchError(
            f"the tokenizer's chat template does not take the messages of prompt {index} ({reason}); give them the "
            "roles and fields that it expects."
        ) from error


def _is_item(value: Any) -> bool:
    """Whether a value is at most part of a prompt: a message, a token id."""
    return isinstance(value, Mapping) or not hasattr(value, "__len__") or getattr(value, "ndim", None) == 0


def without_padding(rows: Tensor, pad: int, ends: Sequence[int]) -> list[Tensor]:
    """The rows of a tensor `(B, L)` of ids without the padding on their left, which is told as transformers tells it.

    Raises:
        InvalidBatchError: padding on the right, or such that could be end-of-sequence tokens.
    """
    real = rows != pad
    if bool(real.all()):
        return list(rows)
    if pad in ends:
        if bool(real[:, 0].any()) and not bool(real[:, 0].all()):
            raise InvalidBatchError(
                f"some rows of the prompts begin with token {pad}, which is padding and an end-of-sequence token, and "
                "is not known to be the one or the other; give lists of ids without padding."
            )
        return list(rows)
    kept = []
    for index, row in enumerate(rows):
        (found,) = real[index].nonzero(as_tuple=True)
        begin = int(found[0]) if len(found) else len(row)
        if len(found) != len(row) - begin:
            raise InvalidBatchError(
                f"prompt {index} has padding (token {pad}) behind its first token; pad on the left, or give lists of "
                "ids without padding."
            )
        kept.append(row[begin:])
    return kept


def pad_left(rows: Sequence[Sequence[int] | np.ndarray], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and the mask of their tokens, both `(B, L)` int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return ids.to(device), mask.to(device)
