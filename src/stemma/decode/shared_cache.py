"""A transformers `Cache` over shared prefixes: for `generate`, or for any forward with `past_key_values`.

The cache holds all tokens of every row but the last one, which is the first to be fed: a model must be given something
to predict from. Rows are taken to be padded on the left, as `generate` has them, and told by the attention mask.

How a layer finds it says `stemma.decode.reading_cache`; the attention is
`stemma.cache.key_values.PrefixKeyValues`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stemma.cache.key_values import PrefixKeyValues, even_heads
from stemma.cache.plan import CALL_BYTES, PrefixNodes, SharingPlan, plan_sharing
from stemma.decode.prompts import pad_left
from stemma.decode.reading_cache import RowsCache, check_decodes
from stemma.decode.shared_prefix import SharedPrefix, encode_tree
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.limits import check_batch, check_lengths
from stemma.prefix.radix import as_ids
from stemma.prefix.tree import PrefixTree

__all__ = ["SharedPrefixCache", "SharingReport"]


@dataclass(frozen=True, kw_only=True)
class SharingReport:
    """What a cache shares before it has new tokens."""

    prompts: int
    """Prompts of the call."""
    rows: int
    """Rows that decode: prompts times samples or beams."""
    row_tokens: int
    """Cached prompt tokens of all rows, shared ones counted each time."""
    encoded_tokens: int
    """Tokens that went through the model for them."""
    prefix_tokens: int
    """Tokens of a prefix that was encoded before, with which each row begins."""
    rectangles: int
    """Shared runs, each read once for all rows below it."""
    shared_tokens: int
    """Tokens of the shared runs."""
    tail_tokens: int
    """Longest run of prompt tokens that each row keeps for itself."""
    shared_bytes: int
    """Keys and values of the shared runs."""
    own_bytes: int
    """Prompts in the rows' own buffers, with padding and without room for new tokens."""
    dense_bytes: int
    """Keys and values of the same prompts repeated for each row, with padding and without room for new tokens."""

    def __add__(self, other: "SharingReport") -> "SharingReport":
        """Of two calls, one after the other: what was counted adds up; lengths and bytes are those of the larger."""
        a, b = asdict(self), asdict(other)
        larger = {"prefix_tokens", "tail_tokens", "shared_bytes", "own_bytes", "dense_bytes"}
        return SharingReport(**{name: max(a[name], b[name]) if name in larger else a[name] + b[name] for name in a})

    def __str__(self) -> str:
        mib = 2**20
        before = f"; {self.rows * self.prefix_tokens} are the prefix of {self.prefix_tokens}, encoded before"
        what = (
            f"{self.rectangles} shared run{'s' if self.rectangles != 1 else ''} of {self.shared_tokens} tokens, each "
            f"read once"
            if self.rectangles
            else "nothing shared while decoding: every row keeps its prompt, as reading copies costs less than a "
            "further kernel call"
        )
        return (
            f"{self.prompts} prompts, {self.rows} rows, {self.row_tokens} prompt tokens of which {self.encoded_tokens} "
            f"were encoded{before if self.prefix_tokens else ''}\n"
            f"{what}; up to {self.tail_tokens} prompt tokens in each row's own buffer\n"
            f"keys and values: {self.shared_bytes / mib:.1f} MiB shared, {self.own_bytes / mib:.1f} MiB own; repeated "
            f"prompts would take {self.dense_bytes / mib:.1f} MiB"
        )


class SharedPrefixCache(RowsCache):
    """Keys and values of many rows, those of shared prefixes once.

    Made by `of`. Hand it to `model.generate(input_ids, attention_mask=..., past_key_values=cache)` with the
    full rows, padded on the left, or to `model(...)` with what follows the cached tokens and the full mask.

    Args:
        model: the model that it is for.
        states: the rows.
        plan: what is shared, for reports.
    """

    def __init__(self, model: nn.Module, states: PrefixKeyValues, plan: SharingPlan) -> None:
        loss = "so it would ignore the shared prefix. Generate without shared prefixes"
        super().__init__(model, states.tokens, int(states.tokens.max(initial=0)), loss)
        self.states, self.plan = states, plan
        self.prefilled_tokens = 0
        """Tokens that were encoded to make it."""
        self.prefix_tokens = 0
        """Tokens of the prefix below which it was made."""

    @classmethod
    @torch.inference_mode(False)  # what is made in it could not be written outside it
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        rows: Sequence[Any],
        *,
        prefix: SharedPrefix | None = None,
        room: int = 64,
        max_tokens: int | None = None,
        min_shared: int = 8,
        call_bytes: int = CALL_BYTES,
    ) -> "SharedPrefixCache":
        """Encode everything but the last token of each row, what rows share once.

        Args:
            model: an enabled model (`stemma.enable`).
            rows: token ids of each row of the batch, at least one each, without what `prefix` holds.
            prefix: what all rows begin with.
            room: new tokens to make room for; more only costs a copy.
            max_tokens: encode at most so many tokens in a forward call.
            min_shared: shortest shared run that is encoded once.
            call_bytes: see `stemma.cache.plan.CALL_BYTES`.

        Raises:
            InvalidBatchError: no row or an empty one, ids outside the vocabulary, more tokens than the model has
                positions, or a prefix of another model.
            UnsupportedModelError: a layer of the model cannot share its keys and values; says which. Or gradient
                checkpointing would drop the cache.
        """
        check_decodes(model)
        if not rows:
            raise InvalidBatchError("there are no rows to decode; give at least one list of token ids.")
        ids = [as_ids(row, f"row {index}") for index, row in enumerate(rows)]
        for index, row in enumerate(ids):
            if row.size == 0:
                raise InvalidBatchError(f"row {index} is empty; decoding needs at least one token to start from.")
        if prefix is not None:
            prefix.check(model)
        handles = [] if prefix is None else prefix.path
        above = 0 if prefix is None else prefix.length
        check_batch(model, PrefixTree.from_sequences(list({row.tobytes(): row for row in ids}.values())))
        check_lengths(model, above + max(row.size for row in ids))
        # Equal paths are one sequence of the tree; rows of one token have no path in it.
        number: dict[bytes, int] = {}
        sequences: list[np.ndarray] = []
        path_of = np.full(len(ids), -1, dtype=np.int64)
        for index, row in enumerate(ids):
            if row.size > 1:
                path = row[:-1]
                if path.tobytes() not in number:
                    number[path.tobytes()] = len(sequences)
                    sequences.append(path)
                path_of[index] = number[path.tobytes()]
        tree = PrefixTree.from_sequences(sequences, min_shared=min_shared) if sequences else None
        nodes, place = _nodes(tree, path_of, [handle.added for handle in handles])
        packed = {}
        if tree is not None:
            context = None if prefix is None else prefix.context()
            encoded = encode_tree(model, tree, context, above, max_tokens)
            packed = {module: even_heads(*pair) for module, pair in encoded.items()}
        lent = [handle.states for handle in handles]
        sizes = next(iter((packed or (lent[0] if lent else {})).values()), None)
        token_bytes = 0 if sizes is None else 2 * sizes.key.element_size() * sizes.key.shape[1] * sizes.key.shape[3]
        plan = plan_sharing(nodes, token_bytes, call_bytes=call_bytes)
        cache = cls(model, PrefixKeyValues(nodes, plan, place, packed, lent, room), plan)
        head = [] if prefix is None else [prefix.ids]
        cache.shown, _ = pad_left([np.concatenate([*head, row[:-1]]) for row in ids], 0, "cpu")
        cache.prefilled_tokens, cache.prefix_tokens = 0 if tree is None else tree.unique_tokens, above
        return cache

    def report(self, prompts: int) -> SharingReport:
        """What the rows of so many prompts share, before they have new tokens."""
        states = self.states
        return SharingReport(
            prompts=prompts,
            rows=states.num_rows,
            row_tokens=int(states.tokens.sum()),
            encoded_tokens=self.prefilled_tokens,
            prefix_tokens=self.prefix_tokens,
            rectangles=states.num_runs,
            shared_tokens=states.shared_tokens,
            tail_tokens=states.tail,
            shared_bytes=states.prefix_bytes,
            own_bytes=states.num_rows * states.tail * states.token_bytes,
            dense_bytes=states.num_rows * int(states.tokens.max(initial=0)) * states.token_bytes,
        )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        partial: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of a layer's new tokens; see `stemma.models.masks.ReadingCache`."""
        self.check_module(module)
        if torch.is_grad_enabled():
            if any(x.requires_grad for x in (query, key, value, *(partial or ()))):
                raise UnsupportedModelError(
                    "a cache of shared prefixes has no gradients; decode under torch.no_grad(), train with "
                    "stemma.score."
                )
            sinks = None if sinks is None else sinks.detach()
        self.unread = None
        return self.states.attend(
            module, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks, partial=partial
        )

    # ------------------------------------------------------------------ rows and lengths

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        self.states.select(beam_idx)
        self.lengths = self.states.tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` new tokens; see `RowsCache`."""
        super().crop(tokens_to_remove)
        self.states.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all new tokens; prefixes and rows stay."""
        super().reset()
        self.states.reset()


def _nodes(tree: PrefixTree | None, path_of: np.ndarray, handles: list[int]) -> tuple[PrefixNodes, np.ndarray]:
    """The nodes below a chain of handles, and the place of each row in the order of the tree; paths of -1 have none."""
    rank = np.zeros(0 if tree is None else tree.num_sequences, dtype=np.int64)
    if tree is not None:
        rank[tree.order] = np.arange(tree.num_sequences)
    rank_of = np.where(path_of >= 0, rank[path_of] if rank.size else -1, -1)
    place = np.empty(path_of.size, dtype=np.int64)
    place[np.argsort(rank_of, kind="stable")] = np.arange(path_of.size)
    chain = len(handles)
    parent, length = np.arange(chain) - 1, np.array(handles, dtype=np.int64)
    first, last = np.zeros(chain, dtype=np.int64), np.full(chain, path_of.size, dtype=np.int64)
    if tree is not None:
        bound = np.searchsorted(np.sort(rank_of), np.arange(tree.num_sequences + 1))
        parent = np.concatenate([parent, np.where(tree.node_parent >= 0, tree.node_parent + chain, chain - 1)])
        length = np.concatenate([length, tree.node_length])
        first, last = np.concatenate([first, bound[tree.node_first]]), np.concatenate([last, bound[tree.node_last]])
    return PrefixNodes(parent, length, first, last, int(path_of.size)), place
