"""Keys and values of one layer of which only some tokens are kept, chosen by attention mass.

Rows may keep different tokens, and different numbers of them; layers are independent of each other. Every stored token
carries its position in its row, in ascending order, and that alone says which queries see it: position `k` is visible
from `q` when `0 <= k <= q` (and `q - k < window`). Negative positions are holes: padding, or room of rows that keep
less than the longest. Keys are stored with their rotary embedding, so a kept key stays where it was.

The attention mass of a key is the sum of the probabilities that queries give it, the mean over query heads. It is
summed in slices of queries, so no attention matrix is ever formed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stemma.attention.decode import decode_attention
from stemma.cache.key_values import even_heads
from stemma.errors import InvalidBatchError

__all__ = ["KeptStates", "attention_mass", "priority", "retained_mass", "visible"]

_MAX_QUERIES = 256
"""Most queries attended at a time: keys behind a slice's last query are not read at all."""
_SLICE_ELEMENTS = 1 << 22
"""Scores held at a time (16 MiB in float32), or those of one query if they are more."""


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, `(rows, queries, keys)` bool.

    Args:
        query_position: `(rows, queries)`; padding, which is negative, sees itself, as a softmax needs something.
        key_position: `(rows, keys)`, holes negative.
        window: keys from this distance on are hidden; None: none are.
    """
    distance = query_position[:, :, None] - key_position[:, None]
    seen = ((distance >= 0) & (key_position[:, None] >= 0)) | (distance == 0)
    return seen if window is None else seen & (distance < window)


def attention_mass(
    query: Tensor,
    key: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    weight: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slice_elements: int = _SLICE_ELEMENTS,
) -> Tensor:
    """Attention that each key gets, `(rows, keys)`: `sum_i weight_i mean_h softmax(scores)_hij`.

    Args:
        query: `(rows, heads, queries, head_dim)`.
        key: `(rows, key_value_heads, keys, head_dim)`, those of the queries last.
        query_position, key_position, window: see `visible`.
        weight: `(rows, queries)`, 0 for queries that do not count; they cost nothing where no row has another.
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        sinks: `(heads,)` logits that take part in the softmax, or None.
        slice_elements: most scores at a time, but for those of one query.

    Returns:
        In float32, float64 for float64 input.
    """
    rows, heads, queries, _ = query.shape
    keys, wide = key.shape[2], torch.promote_types(query.dtype, torch.float32)
    mass = torch.zeros(rows, keys, dtype=wide, device=query.device)
    size = max(1, min(_MAX_QUERIES, slice_elements // (rows * heads * keys)))
    grouped, key = query.unflatten(1, (key.shape[1], -1)), key.to(wide).transpose(2, 3)[:, :, None]
    for begin in range(0, queries, size):
        asked = slice(begin, min(begin + size, queries))
        if not weight[:, asked].any():
            continue
        end = keys - queries + asked.stop
        scores = (grouped[:, :, :, asked].to(wide) @ key[..., :end]).mul_(scale)  # (rows, key heads, group, asked, end)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        seen = visible(query_position[:, asked], key_position[:, :end], window)
        scores.masked_fill_(~seen[:, None, None], float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(wide).view(1, key.shape[1], -1, 1, 1))
        probabilities = scores.sub_(total).exp_()
        mass[:, :end] += torch.einsum("bkgqn,bq->bn", probabilities, weight[:, asked].to(wide)) / heads
    return mass


def priority(importance: np.ndarray, first: int, last: int) -> np.ndarray:
    """Tokens of one row in the order in which they are kept, `(N,)` int64: the protected ones at both ends of the
    row, then by importance; of equal ones the earlier.

    Args:
        importance: `(N,)`, finite and not negative.
        first: protected tokens at the beginning.
        last: protected tokens at the end.

    Raises:
        InvalidBatchError: importances that are no such numbers, or fewer tokens than are protected.
    """
    tokens = importance.size
    if tokens < first + last:
        raise InvalidBatchError(
            f"a row of {tokens} tokens cannot keep its first {first} and last {last}. Protect fewer, or leave such "
            "short rows whole."
        )
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise InvalidBatchError(
            "importances must be finite and not negative; NaN comes from a model that overflows, in float16 say."
        )
    free = np.ones(tokens, dtype=np.int64)
    free[:first] = 0
    free[tokens - last :] = 0
    return np.lexsort((np.arange(tokens), -importance, free))


def retained_mass(importance: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Share of the importance that the first `o` tokens of an order hold, `(N + 1,)` for `o = 0..N`."""
    share = np.concatenate([np.zeros(1), np.cumsum(importance[order], dtype=np.float64)])
    # Rounding must not leave a complete layer below another one.
    return share / share[-1] if share[-1] > 0 else np.arange(share.size) / max(1, share.size - 1)


class KeptStates:
    """Keys, values and positions that one layer keeps, in buffers that grow by doubling.

    Args:
        room: tokens to make room for at first.
        weigh: keep the attention mass of every stored token.
    """

    def __init__(self, room: int, *, weigh: bool) -> None:
        self.length = 0
        """Columns in use; rows that keep less have holes on the left."""
        self.trimmed = False
        """Whether tokens were given up to make room for new ones, so that those cannot be taken back."""
        self.weigh = weigh
        self._room, self._holes = max(1, room), False
        self._buffers: list[Tensor] = []

    @property
    def key(self) -> Tensor:
        """`(rows, key_value_heads, length, head_dim)`."""
        return self._buffers[0][:, :, : self.length]

    @property
    def value(self) -> Tensor:
        """Like `key`."""
        return self._buffers[1][:, :, : self.length]

    @property
    def position(self) -> Tensor:
        """`(rows, length)` int32, ascending; holes are negative."""
        return self._buffers[2][:, : self.length]

    @property
    def mass(self) -> Tensor:
        """`(rows, length)` attention mass, where it is weighed."""
        return self._buffers[3][:, : self.length]

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token of one row."""
        return sum(x.element_size() * x.shape[1] * x.shape[3] for x in self._buffers[:2])

    @property
    def column_bytes(self) -> int:
        """The same with its position and, where it is weighed, its mass."""
        return self.token_bytes + sum(x.element_size() for x in self._buffers[2:])

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers, free room included."""
        return sum(x.untyped_storage().nbytes() for x in self._buffers)

    # ------------------------------------------------------------------ attention

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        weight: Tensor | None = None,
        *,
        padded: bool = False,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Take in new tokens and attend from them.

        Args:
            query: `(rows, heads, n, head_dim)`.
            key: `(rows, key_value_heads, n, head_dim)` of the new tokens.
            value: `(rows, key_value_heads, n, value_dim)`.
            position: `(rows, n)` int32, behind all stored ones; padding on the left is negative.
            weight: `(rows, n)`, how much each query counts in the attention mass; None: nothing is weighed.
            padded: some of the new tokens are padding.
            scale, window, softcap, sinks: see `attention_mass`.

        Returns:
            `(rows, n, heads, value_dim)`.
        """
        value_dim, new = value.shape[-1], query.shape[2]
        key, value = even_heads(key, value)
        query = torch.nn.functional.pad(query.to(value.dtype), (0, value.shape[-1] - query.shape[-1]))
        self._append(key, value, position, window)
        self._holes |= padded
        if weight is not None:
            rules: Any = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
            self.mass.add_(attention_mass(query, self.key, position, self.position, weight, **rules))
        size = max(1, min(_MAX_QUERIES, _SLICE_ELEMENTS // (query.shape[0] * self.length)))
        outputs = []
        for begin in range(0, new, size):
            asked = slice(begin, min(begin + size, new))
            end = self.length - new + asked.stop
            outputs.append(
                decode_attention(
                    query[:, :, asked],
                    self.key[:, :, :end],
                    self.value[:, :, :end],
                    (),
                    scale=scale,
                    bias=self._bias(position[:, asked], end, window, query.dtype),
                    softcap=softcap,
                    sinks=sinks,
                )
            )
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return output if output.shape[-1] == value_dim else output[..., :value_dim]

    def _bias(self, position: Tensor, end: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of the first `end` keys, None where all of them are seen."""
        if position.shape[1] == 1 and window is None and not self._holes:
            return None
        hidden = ~visible(position, self.position[:, :end], window)[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    # ------------------------------------------------------------------ storage

    def _append(self, key: Tensor, value: Tensor, position: Tensor, window: int | None) -> None:
        new = key.shape[2]
        if not self._buffers:
            self._room = max(self._room, new)
            wide = torch.promote_types(key.dtype, torch.float32)
            self._buffers = [key[:, :, :0], value[:, :, :0], position[:, :0]]
            self._buffers += [position[:, :0].to(wide)] if self.weigh else []
            self._rebuild(lambda x: x, 0, self._room)
        elif self.length + new > self._room:
            begin = 0
            if window is not None and self.length >= window:
                begin = self.length - (window - 1)  # columns left of it are out of the sight of every new token
                self.trimmed = True
            end, used = self.length, self.length - begin
            self._rebuild(lambda x: x[:, :, begin:end] if x.dim() == 4 else x[:, begin:end], used, 2 * used + new)
        at = slice(self.length, self.length + new)
        self._buffers[0][:, :, at], self._buffers[1][:, :, at], self._buffers[2][:, at] = key, value, position
        for mass in self._buffers[3:]:
            mass[:, at] = 0
        self.length = at.stop

    def _rebuild(self, part: Callable[[Tensor], Tensor], used: int, room: int) -> None:
        """Move a part of every buffer, of `used` columns, into a new one."""

        def moved(x: Tensor) -> Tensor:
            kept = part(x)
            if x.dim() == 4:
                new = x.new_empty(kept.shape[0], x.shape[1], room, x.shape[3])
                new[:, :, :used] = kept[:, :, :used]
            else:
                new = x.new_empty(kept.shape[0], room)
                new[:, :used] = kept[:, :used]
            return new

        self._buffers = [moved(x) for x in self._buffers]
        self._room, self.length = room, used

    def keep(self, columns: Sequence[np.ndarray], room: int, *, weigh: bool) -> None:
        """Drop all tokens but some.

        Args:
            columns: for each row the columns to keep, ascending; their numbers may differ.
            room: new tokens to make room for.
            weigh: go on keeping the attention mass.
        """
        used = max(len(row) for row in columns)
        index = np.zeros((len(columns), used), dtype=np.int64)
        holes = np.ones(index.shape, dtype=bool)
        for row, chosen in enumerate(columns):
            index[row, used - len(chosen) :] = chosen
            holes[row, used - len(chosen) :] = False
        self.weigh = weigh
        self._buffers = self._buffers[: 3 + weigh]
        where = torch.from_numpy(index).to(self.position.device)

        def part(x: Tensor) -> Tensor:
            if x.dim() == 2:
                return x.gather(1, where)
            return x.gather(2, where[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        self._rebuild(part, used, used + max(1, room))
        self._holes = bool(holes.any())
        self.position.masked_fill_(torch.from_numpy(holes).to(where.device), -1)

    def select(self, index: Tensor) -> None:
        """Let row `i` be what row `index[i]` was."""
        where = index.to(self.position.device)
        self._rebuild(lambda x: x[where], self.length, self._room)

    def forget(self, tokens: int) -> None:
        """Forget the newest `tokens` columns; their attention has been weighed already."""
        self.length -= tokens
