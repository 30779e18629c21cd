"""A transformers `Cache` whose layers keep only some tokens: for `generate`, or any forward with `past_key_values`.

Its length is the number of tokens seen, kept or not, so that positions and the attention mask are those of the whole
rows. Masks are made once for all layers, while layers keep different tokens; so a layer does not use the mask but is
led by it to this cache (`stemma.decode.reading_cache`), which attends from
`stemma.cache.compressed.KeptStates`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stemma.cache.compressed import KeptStates, priority
from stemma.decode.compression_report import CompressionReport, LayerReport
from stemma.decode.prompts import pad_left
from stemma.decode.reading_cache import RowsCache, check_decodes
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model, input_device
from stemma.models.layer_attention import layer_name
from stemma.models.limits import check_batch, check_lengths
from stemma.prefix.radix import as_ids
from stemma.prefix.tree import PrefixTree

__all__ = ["CompressedCache", "DecodeBudget"]

_NO_ATTENTION = ("linear", "mamba", "recurrent", "conv", "ssm", "rwkv")
"""What the config calls layers without keys and values."""


@dataclass(frozen=True)
class DecodeBudget:
    """How a compressed cache stays compressed while it decodes."""

    every: int
    """New tokens after which a layer is brought back to its share of the tokens seen; at least 1."""
    first: int
    """Tokens at the beginning of a row that are never dropped."""
    last: int
    """Newest tokens that are never dropped."""


class CompressedCache(RowsCache):
    """Keys and values of a batch of rows, padded on the left, of which `keep` drops some.

    Made by `prefill`. Hand it to `model.generate(input_ids, attention_mask=..., past_key_values=cache)` with
    whole rows that go on behind the cached tokens, or to `model(...)` with what follows them and the full mask.

    Args:
        model: the model that it is for.
        lengths: `(rows,)` tokens of each row that are to be cached.
        votes: of so many last tokens of each row the attention is summed into `importance`; None: of all; 0: of
            none.
        room: new tokens to make room for.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], *, votes: int | None = None, room: int = 64) -> None:
        loss = "so nothing of it can be dropped. Generate without compression"
        super().__init__(model, np.asarray(lengths, dtype=np.int64), 0, loss)
        kinds = getattr(base_model(model).config.get_text_config(), "layer_types", None) or []
        for number, kind in enumerate(kinds):
            if any(word in kind for word in _NO_ATTENTION):
                raise UnsupportedModelError(
                    f"layer {number} of {self.label} is of type {kind}: it has a state and no keys that could be "
                    "dropped. Use a model whose layers all attend."
                )
        self.windows: dict[int, int | None] = {}
        """Sliding window of each layer, where it is shorter than the longest row of the prompt."""
        self.votes = votes
        """Whose attention is summed, see the class."""
        self._room = room
        self._states: dict[int, KeptStates] = {}
        self._kept = False
        self._retained: dict[int, float] = {}
        self._budget: DecodeBudget | None = None
        self._sizes: dict[int, np.ndarray] = {}
        self._fresh: dict[int, int] = {}

    @classmethod
    @torch.no_grad()
    def prefill(
        cls,
        model: Any,
        rows: Sequence[Any],
        *,
        votes: int | None = None,
        max_tokens: int | None = None,
        room: int = 64,
    ) -> "CompressedCache":
        """Encode all tokens of some rows, whole; `keep` then drops some of them.

        Args:
            model: an enabled model (`stemma.enable`).
            rows: token ids of each row, at least one each.
            votes, room: see the class.
            max_tokens: tokens of a row in one forward call.

        Raises:
            InvalidBatchError: no row or an empty one, ids outside the vocabulary, or more tokens than the model has
                positions.
            UnsupportedModelError: a layer of the model has no keys of its own that could be dropped; says which. Or
                gradient checkpointing would drop the cache.
        """
        check_decodes(model)
        if not rows:
            raise InvalidBatchError("there are no rows to compress; give at least one list of token ids.")
        ids = [as_ids(row, f"row {index}") for index, row in enumerate(rows)]
        for index, row in enumerate(ids):
            if row.size == 0:
                raise InvalidBatchError(f"row {index} is empty; there is nothing to compress.")
        check_batch(model, PrefixTree.from_sequences(list({row.tobytes(): row for row in ids}.values())))
        check_lengths(model, max(row.size for row in ids))
        cache = cls(model, [row.size for row in ids], votes=votes, room=room)
        inner, longest = base_model(model), cache.prompt_length
        whole, mask = pad_left(ids, 0, input_device(inner))
        position = (mask.cumsum(1) - 1).clamp(min=0)
        parameters = inspect.signature(inner.forward).parameters
        extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        for begin in range(0, longest, max_tokens or longest):
            part = slice(begin, begin + (max_tokens or longest))
            model(
                input_ids=whole[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=position[:, part],
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
        cache.check_read()
        cache.shown = whole
        missing = sorted({*range(len(cache.layers))} - {*cache._states})
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} of {cache.label} did not attend to keys of their own (recurrence, convolution, or "
                "keys of another layer), so there is nothing of theirs to drop. Use a model whose layers all attend."
            )
        return cache

    # ------------------------------------------------------------------ importance and what is kept

    def bounded(self, layer: int) -> np.ndarray:
        """`(rows,)` bool: whether a sliding window shorter than the row's prompt bounds what a layer needs of it."""
        window = self.windows[layer]
        return np.zeros(self.batch_size, dtype=bool) if window is None else self.lengths > window

    def importance(self) -> list[dict[int, np.ndarray]]:
        """Attention mass `(tokens,)` float64 of the prompt, for each row and each layer that no window bounds; zeros
        where no attention was summed."""
        found: list[dict[int, np.ndarray]] = [{} for _ in range(self.batch_size)]
        for number, states in sorted(self._states.items()):
            mass = states.mass.double().cpu().numpy() if states.weigh else np.zeros(tuple(states.position.shape))
            for row in np.flatnonzero(~self.bounded(number)).tolist():
                found[row][number] = mass[row, mass.shape[1] - self.lengths[row] :]
        return found

    def keep(
        self,
        tokens: Sequence[Mapping[int, np.ndarray]],
        *,
        retained: Mapping[int, float] | None = None,
        budget: DecodeBudget | None = None,
    ) -> None:
        """Drop all tokens of the prompt but some; what is dropped is gone.

        Args:
            tokens: for each row and each layer that no window bounds (see `importance`) the numbers of the tokens
                to keep, ascending, at least one.
            retained: for reports, see `stemma.decode.compression_report.LayerReport.retained_mass`.
            budget: keep the same share of new tokens; None: keep them all.

        Raises:
            InvalidBatchError: other rows, layers or tokens than there are, or a cache that has gone on already.
        """
        self.check_read()
        if self._kept or self.new_columns:
            raise InvalidBatchError("a cache is compressed once, when the prompt has been encoded and nothing else.")
        if len(tokens) != self.batch_size:
            raise InvalidBatchError(f"tokens to keep of {len(tokens)} rows, for a cache of {self.batch_size}.")
        for row, (chosen, length) in enumerate(zip(tokens, self.lengths, strict=True)):
            layers = [number for number in sorted(self._states) if not self.bounded(number)[row]]
            if sorted(chosen) != layers:
                raise InvalidBatchError(f"row {row}: tokens to keep are needed in layers {layers}, not {list(chosen)}.")
            for number, each in chosen.items():
                if not each.size or each[0] < 0 or each[-1] >= length or (np.diff(each) <= 0).any():
                    raise InvalidBatchError(
                        f"row {row}, layer {number}: tokens to keep must be ascending numbers below {length}, at "
                        "least one."
                    )
        for number, states in self._states.items():
            window = self.windows[number] or 0
            kept = [
                chosen[number] if number in chosen else np.arange(length - window + 1, length)
                for chosen, length in zip(tokens, self.lengths, strict=True)
            ]
            columns = [each + pad for each, pad in zip(kept, self.pads, strict=True)]
            states.keep(columns, self._room, weigh=budget is not None and not self.bounded(number).all())
            self._sizes[number] = np.array([each.size for each in kept])
        self._kept, self._budget, self._retained = True, budget, dict(retained or {})

    def report(self) -> CompressionReport:
        """What each layer keeps."""
        seen = self.get_seq_length() - self.pads
        layers, whole, counted = [], 0, np.zeros(2)
        for number, states in sorted(self._states.items()):
            window, free = self.windows[number], ~self.bounded(number)
            kept = (states.position >= 0).sum(1).cpu().numpy()
            counted += kept[free].sum(), seen[free].sum()
            whole += int(np.where(free, seen, np.minimum(seen, window or 0)).sum()) * states.token_bytes
            layers.append(
                LayerReport(
                    layer=number,
                    window=window,
                    seen=float(seen.mean()),
                    kept=float(kept.mean()),
                    retained_mass=self._retained.get(number),
                    bytes=states.column_bytes * states.length * self.batch_size,
                )
            )
        return CompressionReport(
            rows=self.batch_size,
            layers=tuple(layers),
            kept_bytes=sum(layer.bytes for layer in layers),
            allocated_bytes=sum(states.allocated_bytes for states in self._states.values()),
            whole_bytes=whole,
            kept_share=counted[0] / max(1.0, counted[1]),
        )

    def positions(self, layer: int) -> list[list[int]]:
        """Positions of the tokens that a layer keeps of each row, ascending."""
        return [[x for x in row if x >= 0] for row in self._states[layer].position.tolist()]

    # ------------------------------------------------------------------ attention

    @torch.no_grad()
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
        if any(x.requires_grad for x in (query, key, value)):
            raise UnsupportedModelError("a compressed cache has no gradients; use it under torch.no_grad().")
        if partial is not None:
            raise UnsupportedModelError(
                f"{layer_name(module)} has a learned prefix, whose share of attention a compressed cache does not "
                "weigh. Detach it, or generate without compression."
            )
        number, self.unread = self.unread, None
        if number is None:
            raise UnsupportedModelError(
                f"{layer_name(module)} of {self.label} attends to keys of another layer, which cannot be dropped for "
                "the one and kept for the other. Generate without compression."
            )
        new, pads = query.shape[2], self.pads
        begin = self.layers[number].get_seq_length() - new
        if begin < self.prompt_length:
            self.windows[number] = window
        column = torch.arange(begin, begin + new, dtype=torch.int32)
        position = (column - torch.from_numpy(pads)[:, None]).to(query.device, torch.int32)
        if number not in self._states:
            self._states[number] = KeptStates(self.prompt_length, weigh=self.votes != 0)
        states = self._states[number]
        output = states.attend(
            query,
            key,
            value,
            position,
            self._weights(number, states, position),
            padded=bool(begin < pads.max()),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        if self._budget is not None and states.weigh:
            self._fresh[number] = self._fresh.get(number, 0) + new
            if self._fresh[number] >= self._budget.every:
                self._drop(number, states, self._budget)
        return output

    def _weights(self, number: int, states: KeptStates, position: Tensor) -> Tensor | None:
        """How much each new query counts: those of the prompt as they vote, new ones all."""
        if not states.weigh or (self._kept and self._budget is None) or self.bounded(number).all():
            return None
        if self._kept or self.votes is None:
            return (position >= 0).float()
        last = torch.from_numpy(self.lengths - self.votes).to(position.device)[:, None]
        return ((position >= 0) & (position >= last)).float()

    def _drop(self, number: int, states: KeptStates, budget: DecodeBudget) -> None:
        """Bring a layer back to its share of the tokens seen; the least important tokens go."""
        seen, bounded = self.layers[number].get_seq_length() - self.pads, self.bounded(number)
        mass, position = states.mass.double().cpu().numpy(), states.position.cpu().numpy()
        columns = []
        for row, (size, prompt) in enumerate(zip(self._sizes[number], self.lengths, strict=True)):
            (held,) = np.nonzero(position[row] >= 0)
            allowed = max(int(size * seen[row] // prompt), budget.first + budget.last)
            if held.size > allowed and not bounded[row]:
                order = priority(mass[row, held], budget.first, budget.last)
                held = held[np.sort(order[:allowed])]
            columns.append(held)
        states.keep(columns, max(budget.every, self._room), weigh=True)
        self._fresh[number] = 0

    # ------------------------------------------------------------------ rows and lengths

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        rows = beam_idx.cpu().numpy()
        self.lengths = self.lengths[rows]
        self._sizes = {number: sizes[rows] for number, sizes in self._sizes.items()}
        for states in self._states.values():
            states.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` new tokens; see `RowsCache`.

        Raises:
            ValueError: older tokens have made room for them, too.
        """
        if self._budget is not None or any(states.trimmed for states in self._states.values()):
            raise ValueError(
                "new tokens cannot be taken back where older ones are dropped for them (a budget while decoding, or a "
                "sliding window); compress the prompt again."
            )
        super().crop(tokens_to_remove)
        for states in self._states.values():
            states.forget(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all new tokens; the compressed prompt stays, for the next question about it."""
        self.crop(-self.new_columns)
