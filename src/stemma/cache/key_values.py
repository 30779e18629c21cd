"""Keys and values of rows that hang below a prefix tree: shared runs once, and a growing buffer for what a row owns.

The tensors are those that attention sees (rotary embedding applied, latent keys expanded), one pair for each attention
module. Runs of the tree that `stemma.cache.plan` chose to share are stored once, whatever the number of rows; a
row's own buffer holds its tail, right-aligned so that the next token has one column in all rows, and then its new
tokens. Shared tensors are never written.

Rows may leave, be repeated or change places at any time (finished sequences, beams): a row carries its path with it, so
the ranges of the shared runs are counted anew and only own buffers move.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stemma.attention.decode import Segment, decode_attention
from stemma.cache.plan import PrefixNodes, SharingPlan

__all__ = ["KeyValues", "PrefixKeyValues", "even_heads"]


Module = Any
"""What names an attention module; anything hashable."""


class KeyValues(NamedTuple):
    """Keys and values `(1, key_value_heads, tokens, head_dim)` of one attention module, of one head size."""

    key: Tensor
    value: Tensor


def even_heads(key: Tensor, value: Tensor) -> KeyValues:
    """Give keys and values one head size with zeros, which change no score and no output (latent attention has two)."""
    if key.shape[-1] == value.shape[-1] and key.dtype == value.dtype:
        return KeyValues(key, value)
    wider = max(key.shape[-1], value.shape[-1])
    return KeyValues(_widened(key.to(value.dtype), wider), _widened(value, wider))


def _widened(states: Tensor, dim: int) -> Tensor:
    missing = dim - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states


class _Shared(NamedTuple):
    """A rectangle's place in the rows and among positions."""

    number: int
    first: int
    last: int
    position: int
    tokens: int


class _Span(NamedTuple):
    """Queries that see the keys of a rectangle from `begin` on."""

    number: int
    begin: int
    queries: slice | Tensor


class _Own:
    """Keys and values `(rows, key_value_heads, length, head_dim)` with room for more."""

    def __init__(self, key: Tensor, value: Tensor, length: int) -> None:
        self.key, self.value, self.length = key, value, length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        begin, self.length = self.length, self.length + key.shape[2]
        if self.length > self.key.shape[2]:
            self._move(slice(None), begin, max(self.length, 2 * self.key.shape[2]))
        self.key[:, :, begin : self.length] = key
        self.value[:, :, begin : self.length] = value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]

    def select(self, index: Tensor) -> None:
        self._move(index.to(self.key.device), self.length, self.key.shape[2])

    def _move(self, index: slice | Tensor, used: int, room: int) -> None:
        rows = self.key.shape[0] if isinstance(index, slice) else index.shape[0]
        moved = []
        for old in (self.key, self.value):
            new = old.new_empty(rows, old.shape[1], room, old.shape[3])
            new[:, :, :used] = old[index, :, :used]
            moved.append(new)
        self.key, self.value = moved


class PrefixKeyValues:
    """What every row of a batch has seen, in all attention modules of a model.

    Args:
        nodes: the tree, rows in its order.
        plan: what of it is shared.
        place: `(rows,)` int64, the place in the order of the tree of each row of the batch.
        packed: for each module the states of the nodes behind `handles`, packed in the order of `nodes`.
        handles: for each of the first nodes its states by module, kept by someone else; a run that is one such node
            is read where it lies.
        room: new tokens to make room for at first; buffers grow by doubling.
    """

    def __init__(
        self,
        nodes: PrefixNodes,
        plan: SharingPlan,
        place: np.ndarray,
        packed: Mapping[Module, KeyValues],
        handles: Sequence[Mapping[Module, KeyValues]] = (),
        room: int = 64,
    ) -> None:
        depth = nodes.depth
        self.tokens = nodes.row_tokens[place]
        """`(rows,)`: prefix tokens of each row of the batch."""
        self._room, self._place = max(1, room), place
        self._shared = tuple(
            _Shared(number, run.first, run.last, int(depth[run.nodes[0]]), int(nodes.length[list(run.nodes)].sum()))
            for number, run in enumerate(plan.rectangles)
        )
        tails = np.array([int(nodes.length[list(tail)].sum()) for tail in plan.tails], dtype=np.int64)[place]
        self.tail = int(tails.max(initial=0))
        """Longest tail, the own tokens that a row begins with."""
        self._pads = self.tail - tails
        self._keep(nodes, plan, packed, handles)
        self._arrange()

    # ------------------------------------------------------------------ storage

    def _keep(
        self,
        nodes: PrefixNodes,
        plan: SharingPlan,
        packed: Mapping[Module, KeyValues],
        handles: Sequence[Mapping[Module, KeyValues]],
    ) -> None:
        lent = {run.nodes[0] for run in plan.rectangles if len(run.nodes) == 1 and run.nodes[0] < len(handles)}
        gathered = [run.nodes for run in plan.rectangles if run.nodes[0] not in lent or len(run.nodes) > 1]
        begin = np.cumsum(nodes.length) - nodes.length
        copies_handles = any(node < len(handles) for run in (*gathered, *plan.tails) for node in run)
        if not copies_handles and handles:
            begin = begin - begin[len(handles)] if begin.size > len(handles) else begin

        def tokens(run: Sequence[int]) -> list[np.ndarray]:
            return [np.arange(begin[node], begin[node] + nodes.length[node]) for node in run]

        index = np.concatenate([np.zeros(0, dtype=np.int64), *(part for run in gathered for part in tokens(run))])
        tail_index = np.zeros((self._place.size, self.tail), dtype=np.int64)
        for row, slot in enumerate(self._place.tolist()):
            if plan.tails[slot]:
                tail_index[row, self._pads[row] :] = np.concatenate(tokens(plan.tails[slot]))
        self._runs: dict[Module, list[KeyValues]] = {}
        self._own: dict[Module, _Own] = {}
        for module in packed or (handles[0] if handles else ()):
            parts = [handle[module] for handle in handles] if copies_handles else []
            parts += [packed[module]] if packed else []
            source = KeyValues(*(torch.cat(x, dim=2) for x in zip(*parts, strict=True))) if len(parts) > 1 else None
            source = source or (parts[0] if parts else None)
            stored = None
            if source is not None:
                where = torch.from_numpy(index).to(source.key.device)
                stored = [x.index_select(2, where) for x in source] if index.size else None
                if self.tail:
                    self._own[module] = self._tails(source, tail_index)
            self._runs[module] = []
            used = 0
            for run in plan.rectangles:
                if len(run.nodes) == 1 and run.nodes[0] in lent:
                    self._runs[module].append(handles[run.nodes[0]][module])
                    continue
                assert stored is not None
                length = int(nodes.length[list(run.nodes)].sum())
                self._runs[module].append(KeyValues(*(x[:, :, used : used + length] for x in stored)))
                used += length

    def _tails(self, source: KeyValues, index: np.ndarray) -> _Own:
        rows, where = index.shape[0], torch.from_numpy(index).to(source.key.device)

        def filled(x: Tensor) -> Tensor:
            new = x.new_empty(rows, x.shape[1], self.tail + self._room, x.shape[3])
            new[:, :, : self.tail] = x[0][:, where].transpose(0, 1)
            return new

        return _Own(filled(source.key), filled(source.value), self.tail)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the shared runs, each storage counted once."""
        return _distinct_bytes(x for runs in self._runs.values() for states in runs for x in states)

    @property
    def own_bytes(self) -> int:
        """Bytes of the rows' own buffers, with the room that is still free."""
        return _distinct_bytes(x for own in self._own.values() for x in (own.key, own.value))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all modules, 0 before any are known."""
        known = [states for runs in self._runs.values() for states in runs[:1]]
        known = known or [KeyValues(own.key, own.value) for own in self._own.values()]
        return sum(x.element_size() * x.shape[1] * x.shape[3] for states in known for x in states)

    @property
    def num_runs(self) -> int:
        """Shared runs that some row sees."""
        return len(self._ranges)

    @property
    def shared_tokens(self) -> int:
        """Tokens of these runs."""
        return sum(run.tokens for run, _, _ in self._ranges)

    # ------------------------------------------------------------------ rows

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return int(self._place.size)

    def _arrange(self) -> None:
        """Number the rows in the order of the tree anew, after rows have come, gone or changed places."""
        order = np.argsort(self._place, kind="stable")
        ranks = self._place[order]
        first = np.searchsorted(ranks, [run.first for run in self._shared]).tolist()
        last = np.searchsorted(ranks, [run.last for run in self._shared]).tolist()
        self._ranges = [(run, a, b) for run, a, b in zip(self._shared, first, last, strict=True) if a < b]
        self._sorted_tokens = self.tokens[order]
        self._longest, self._most_pads = int(self.tokens.max(initial=0)), int(self._pads.max(initial=0))
        straight = bool((order == np.arange(order.size)).all())
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        self._order = None if straight else (torch.from_numpy(order), torch.from_numpy(inverse))
        self._schedules: dict[tuple[Any, ...], tuple[int, Tensor | None, list[_Span]]] = {}

    def select(self, index: Tensor) -> None:
        """Let row `i` of the batch be what row `index[i]` was: keep some rows, repeat them, or reorder them."""
        rows = index.cpu().numpy()
        same_paths = np.array_equal(self._place[rows], self._place)
        for own in self._own.values():
            own.select(index)
        if not same_paths:
            self.tokens, self._place, self._pads = self.tokens[rows], self._place[rows], self._pads[rows]
            self._arrange()

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` new tokens of every row."""
        for own in self._own.values():
            assert own.length - tokens >= self.tail
            own.length -= tokens

    def reset(self) -> None:
        """Forget all new tokens; prefixes and rows stay."""
        for own in self._own.values():
            own.length = self.tail

    # ------------------------------------------------------------------ attention

    def attend(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        partial: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Take in the new tokens of a module and attend from them.

        Args:
            module: which.
            query: `(rows, heads, n, head_dim)`.
            key: `(rows, key_value_heads, n, head_dim)` of the new tokens.
            value: `(rows, key_value_heads, n, value_dim)`.
            scale: factor on the scores.
            window: a key is visible when `position_query - position_key < window`; None for all.
            softcap: `c` of `c * tanh(score / c)`, or None.
            sinks: `(heads,)` logits that take part in the softmax and carry no value, or None.
            partial: attention over keys outside the cache, `(rows, heads, n, value_dim)`, and its log-sum-exp
                `(rows, heads, n)`, or None.

        Returns:
            `(rows, n, heads, value_dim)`.
        """
        value_dim, new = value.shape[-1], query.shape[2]
        key, value = even_heads(key, value)
        if query.shape[-1] != value.shape[-1] or query.dtype != value.dtype:
            query = _widened(query.to(value.dtype), value.shape[-1])
        if partial is not None:
            partial = _widened(partial[0], value.shape[-1]), partial[1]
        if module not in self._own:
            shape = (key.shape[0], key.shape[1], max(self._room, new), key.shape[3])
            self._own[module] = _Own(key.new_empty(shape), value.new_empty(shape), 0)
        own = self._own[module]
        seen = own.length - self.tail
        own_key, own_value = own.append(key, value)
        begin, bias, spans = self._schedule(seen, new, window, query)
        runs = self._runs.get(module, [])
        segments = []
        for span in spans:
            shared_key, shared_value = runs[span.number]
            if span.begin:
                shared_key, shared_value = shared_key[:, :, span.begin :], shared_value[:, :, span.begin :]
            segments.append(Segment(shared_key, shared_value, span.queries))
        order = None if self._order is None else (self._order[0].to(query.device), self._order[1].to(query.device))
        if begin:
            own_key, own_value = own_key[:, :, begin:], own_value[:, :, begin:]
        output = decode_attention(
            query,
            own_key,
            own_value,
            segments,
            scale=scale,
            bias=bias,
            order=order,
            softcap=softcap,
            sinks=sinks,
            partial=partial,
        )
        return output if output.shape[-1] == value_dim else output[..., :value_dim]

    def _schedule(
        self, seen: int, new: int, window: int | None, query: Tensor
    ) -> tuple[int, Tensor | None, list[_Span]]:
        """First visible own column, the bias on own keys, and the visible part of each run; alike in all modules."""
        if window is not None and window >= self._longest + seen + new:
            window = None
        key = (seen, new, window, query.dtype, query.device)
        found = self._schedules.get(key)
        if found is None:
            if any(known[:2] != key[:2] for known in self._schedules):
                self._schedules.clear()
            begin, bias = self._own_view(seen, new, window, query)
            found = self._schedules[key] = (begin, bias, self._spans(seen, new, window, query.device))
        return found

    def _own_view(self, seen: int, new: int, window: int | None, query: Tensor) -> tuple[int, Tensor | None]:
        length = self.tail + seen + new
        begin = 0 if window is None else max(0, length - new + 1 - window)
        if new == 1 and self._most_pads <= begin:
            return begin, None
        column, asking = np.arange(begin, length), np.arange(length - new, length)
        visible = (column >= self._pads[:, None])[:, None, None] & (column <= asking[:, None])
        if window is not None:
            visible = visible & (column > asking[:, None] - window)
        bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(torch.from_numpy(~visible), float("-inf"))
        return begin, bias.to(query.device)

    def _spans(self, seen: int, new: int, window: int | None, device: torch.device) -> list[_Span]:
        spans: list[_Span] = []
        for run, first, last in self._ranges:
            everyone = slice(first * new, last * new)
            if window is None:
                spans.append(_Span(run.number, 0, everyone))
                continue
            position = (self._sorted_tokens[first:last, None] + seen + np.arange(new)).reshape(-1)
            begin = np.clip(position - window + 1 - run.position, 0, run.tokens)
            for visible in np.unique(begin).tolist():
                if visible == run.tokens:
                    continue
                chosen = np.flatnonzero(begin == visible) + first * new
                consecutive = chosen[-1] - chosen[0] + 1 == chosen.size
                queries: slice | Tensor = slice(int(chosen[0]), int(chosen[-1]) + 1)
                if not consecutive:
                    queries = torch.from_numpy(chosen).to(device)
                spans.append(_Span(run.number, visible, queries))
        return spans


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
