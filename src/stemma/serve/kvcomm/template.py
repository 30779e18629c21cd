"""Templates with named placeholders, and the token ids of a prompt that is made of cached parts."""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stemma.errors import InvalidBatchError
from stemma.models.tokens import text_ids

__all__ = ["Part", "Template", "check_joins"]

_MARK = "\ue000{}\ue001"
"""Stands for a placeholder while a chat template is rendered: private-use characters, which no template writes."""


@dataclass(frozen=True)
class Template:
    """Pieces of text around placeholders: `pieces[0] names[0] pieces[1] names[1] ... pieces[-1]`."""

    pieces: tuple[str, ...]
    names: tuple[str, ...]
    special_tokens: bool = True
    """Whether the tokenizer's own tokens go in front (not where a chat template writes them)."""

    def __post_init__(self) -> None:
        if not self.names:
            raise InvalidBatchError("the template has no placeholder; write one as {name}.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise InvalidBatchError(f"the template has {{{twice[0]}}} twice; give each placeholder a name of its own.")

    @classmethod
    def parse(cls, text: str) -> "Template":
        """`"Question: {question}\\nAnswer:"`, braces that are none doubled as in `str.format`.

        Raises:
            InvalidBatchError: no placeholder, one without a name or with a format, one name twice.
        """
        pieces, names = _split(text)
        return cls(tuple(pieces), tuple(names))

    @classmethod
    def of_messages(cls, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> "Template":
        """Chat messages whose contents have placeholders, with the tokenizer's template and its generation prompt.

        Raises:
            InvalidBatchError: as `parse`, or the chat template lost or repeated a placeholder.
        """
        marked, order = [], []
        for message in messages:
            pieces, names = _split(message["content"])
            marks = [_MARK.format(name) for name in names]
            content = "".join(part for pair in zip(pieces, [*marks, ""], strict=True) for part in pair)
            marked.append({**message, "content": content})
            order += names
        rest: str = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
        pieces = []
        for name in order:
            piece, found, rest = rest.partition(_MARK.format(name))
            if not found:
                raise InvalidBatchError(f"the chat template does not keep placeholder {{{name}}} in its place.")
            pieces.append(piece)
        return cls((*pieces, rest), tuple(order), special_tokens=False)

    def piece_ids(self, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        """Token ids of each piece, each by itself; the tokenizer's own tokens belong to the first."""
        first = tuple(text_ids(tokenizer, self.pieces[0], special_tokens=self.special_tokens))
        return (first, *(tuple(text_ids(tokenizer, piece, special_tokens=False)) for piece in self.pieces[1:]))

    def digest(self, tokenizer: Any) -> str:
        """Names the template and its tokens."""
        content = repr((self.names, self.piece_ids(tokenizer)))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _split(text: str) -> tuple[list[str], list[str]]:
    pieces, names = [""], []
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InvalidBatchError(
            f"the template cannot be read: {error}. Double braces that are no placeholder."
        ) from error
    for literal, name, form, conversion in fields:
        pieces[-1] += literal
        if name is None:
            continue
        if not name or form or conversion:
            raise InvalidBatchError(
                f"a placeholder is written {{name}}, got {{{name}{'!' if conversion else ''}{conversion or ''}"
                f"{':' if form else ''}{form or ''}}}. Double braces that are no placeholder."
            )
        names.append(name)
        pieces.append("")
    return pieces, names


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt."""

    ids: tuple[int, ...]
    text: str | None
    """None for tokens that another agent produced, which are joined as they are."""
    label: str


def check_joins(tokenizer: Any, parts: Sequence[Part], special_tokens: bool) -> None:
    """Refuse parts whose ids, one behind the other, are not the ids of the whole text.

    Raises:
        InvalidBatchError: says between which parts.
    """
    begin = 0
    for end in range(len(parts) + 1):
        if end < len(parts) and parts[end].text is not None:
            continue
        _check_run(tokenizer, parts[begin:end], special_tokens and begin == 0)
        begin = end + 1


def _check_run(tokenizer: Any, parts: Sequence[Part], special_tokens: bool) -> None:
    if len(parts) < 2:
        return
    joined = [token for part in parts for token in part.ids]
    whole = text_ids(tokenizer, "".join(part.text or "" for part in parts), special_tokens=special_tokens)
    if joined == whole:
        return
    same = next((i for i, pair in enumerate(zip(joined, whole, strict=False)) if pair[0] != pair[1]), len(joined))
    end, place = 0, 0
    for place, part in enumerate(parts[:-1]):
        end += len(part.ids)
        if same < end + max(1, len(parts[place + 1].ids) // 2):
            break
    left, right = parts[place], parts[place + 1]
    raise InvalidBatchError(
        f"the tokens of {left.label} and {right.label} joined are not those of the text: around "
        f"{(left.text or '')[-12:]!r} + {(right.text or '')[:12]!r} the tokenizer reads across the border. Let the "
        "template break where tokens do (at a line break or a special token, say)."
    )
