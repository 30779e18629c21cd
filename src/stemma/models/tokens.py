"""The special tokens of a model and its tokenizer: which ids end a row, and what a text becomes that goes on."""

from operator import index
from typing import Any

from stemma.errors import UnsupportedModelError

__all__ = ["as_id_list", "end_token_ids", "text_ids"]


def as_id_list(ids: Any) -> list[int]:
    """Ids as configs have them, one number, several or None, as a list; tensors too.

    Raises:
        ValueError: it holds something else than whole numbers.
    """
    if ids is None:
        return []
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    try:
        return [index(token) for token in (ids if isinstance(ids, (list, tuple, set, frozenset)) else [ids])]
    except TypeError:
        raise ValueError(f"token ids must be whole numbers, one or a list of them; got {ids!r}") from None


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a row: those of the model's generation config and that of the tokenizer, ascending; maybe none.

    Chat models often have two: one that ends a turn, which only the generation config may name, and one that ends a
    document.
    """
    config = getattr(model, "generation_config", None)
    found = as_id_list(getattr(config, "eos_token_id", None)) + as_id_list(getattr(tokenizer, "eos_token_id", None))
    return sorted(set(found))


def text_ids(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Token ids of a text that something follows: a completion, or more text.

    Args:
        tokenizer: of the model.
        text: the text.
        special_tokens: put the tokenizer's own tokens in front. What it puts behind a text (an end-of-sequence token,
            say) is left out, as nothing could follow it.

    Raises:
        UnsupportedModelError: it cannot be told what the tokenizer puts behind a text.
    """
    if not special_tokens:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    if not ids or ids[-1] not in tokenizer.all_special_ids:
        return ids
    for probe in ("a", text):  # a text without special tokens shows how many are put behind, if it has any token
        whole, plain = (list(tokenizer(probe, add_special_tokens=added)["input_ids"]) for added in (True, False))
        for end in range(len(whole), len(plain) - 1, -1):
            if plain and whole[end - len(plain) : end] == plain:
                return ids[: len(ids) - (len(whole) - end)]
    raise UnsupportedModelError(
        f"the tokenizer ({type(tokenizer).__name__}) reads a text otherwise between its special tokens than without "
        "them, so it cannot be told what it puts behind the text; give token ids."
    )
