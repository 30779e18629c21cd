"""What caches that compute attention themselves have in common: rows padded on the left, lengths, masks, and the guard.

How a layer finds its cache: it updates the cache with its new keys and values, which only notes the visit and hands
them back, and then attends. The mask it attends with is a marker that leads to the cache (`stemma.models.masks`).
A layer that updates but does not attend through the marker would silently ignore what the cache holds; it is refused by
name.

A cache sees keys, not tokens, so rows that do not continue what it holds would be answered from the tokens of others.
transformers' `generate` has whole rows in hand where it prepares the inputs of a forward; there they are compared.
"""

import inspect
from copy import deepcopy
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model, is_enabled, model_label
from stemma.models.masks import mask_is_for
from stemma.scoring.refusals import check_model

__all__ = ["RowsCache", "check_decodes"]


class _Layer(CacheLayerMixin):
    """What a layer of the model sees of the cache: lengths."""

    is_sliding = False
    is_croppable = False  # not for transformers, which would ask to record what is cropped; `crop` of the cache works
    supports_early_init = False

    def __init__(self, cache: "RowsCache", number: int, seen: int) -> None:
        super().__init__()
        self.owner = ref(cache)  # weak, as in a cycle keys and values would outlive their last use
        self.number, self.seen = number, seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = self.owner()
        assert cache is not None, "whoever updates a layer holds its cache"
        cache.check_read()
        cache.unread = self.number
        if key_states.shape[0] != cache.batch_size:
            raise cache._other_rows(key_states.shape[0])
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _PrepareInputs:
    """A model's `prepare_inputs_for_generation`, which shows rows to the cache that goes on with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)  # weak, as the model holds this
        self.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # which transformers reads

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        model, cache = self._model(), kwargs.get("past_key_values")
        assert model is not None, "whoever calls a method of a model holds it"
        if isinstance(cache, RowsCache):
            whole = kwargs.get("next_sequence_length") is not None  # of which the last so many are new
            cache.follow(input_ids, first=bool(kwargs.get("is_first_iteration")), whole=whole)
        return type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PrepareInputs":
        return _PrepareInputs(memo[id(self._model())])

    def __reduce__(self) -> Any:
        return getattr, (self._model(), "prepare_inputs_for_generation")


def check_decodes(model: nn.Module) -> None:
    """Refuse a model that cannot decode with a cache that answers queries.

    Raises:
        UnsupportedModelError: it is not enabled, drops activations at random, has an adapter that depends on the whole
            row, or drops its caches for gradient checkpointing.
    """
    check_model(model)
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedModelError(
            "gradient checkpointing is on in train mode, where transformers' layers drop their cache; call "
            "model.eval() to decode, or model.gradient_checkpointing_disable()."
        )


class RowsCache(Cache):
    """A cache for rows that are padded on the left; subclasses attend.

    Args:
        model: the model that it is for.
        lengths: `(rows,)` int64, prompt tokens of each row.
        seen: columns that it holds from the start.
        loss: what a layer that does not read the cache would do, for messages.
    """

    def __init__(self, model: nn.Module, lengths: np.ndarray, seen: int, loss: str) -> None:
        inner = base_model(model)
        config = inner.config.get_text_config()
        super().__init__(layers=[_Layer(self, number, seen) for number in range(int(config.num_hidden_layers))])
        self.prompt_length = int(lengths.max(initial=0))
        """Columns of the prompt."""
        self.lengths = lengths
        self.unread: int | None = None
        """Layer that has put its keys here and not yet attended."""
        self.label = model_label(inner)
        self._loss = loss
        self.positions_given = "position_ids" in inspect.signature(inner.forward).parameters
        """Whether the model is told the positions of new tokens; `generate` tells them only by that parameter."""
        self._modules = frozenset(inner.modules())
        self._model = ref(inner)
        self.shown = torch.zeros(len(lengths), 0, dtype=torch.int64)
        """`(rows, columns)` ids that it holds, as far as they are known: a forward call does not tell them."""
        if not isinstance(vars(inner).get("prepare_inputs_for_generation"), _PrepareInputs):
            inner.prepare_inputs_for_generation = _PrepareInputs(inner)  # type: ignore[method-assign]

    @property
    def lengths(self) -> np.ndarray:
        """`(rows,)` prompt tokens of each row."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        # Every step asks for these; numpy, which nothing else in a step uses, would cost more than a kernel call.
        pads = self.pads
        longest = int(pads.argmin()) if pads.size else 0
        self._longest = longest, int(pads[longest]) if pads.size else 0
        self._padded = bool(pads.any())

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(self.lengths.size)

    @property
    def pads(self) -> np.ndarray:
        """`(rows,)` columns of padding on the left of each row."""
        return self.prompt_length - self.lengths

    @property
    def new_columns(self) -> int:
        """Columns behind the prompt."""
        return self.get_seq_length() - self.prompt_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a mask, and their offset; the next mask function will know that this cache was asked."""
        self.check_read()
        model = self._model()
        if model is not None and not is_enabled(model):
            raise UnsupportedModelError(
                f"{self.label} is not enabled, so its layers do not find this cache; call stemma.enable(model) before "
                "going on with it. (stemma.generate enables a model for the length of a call.)"
            )
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        mask_is_for(self, length, query_length)  # type: ignore[arg-type]  # subclasses attend
        return length, offset

    def check_mask(self, attention_mask: Tensor | None, new_tokens: int) -> tuple[int, int]:
        """Refuse a mask that hides anything but the padding left of each row; see
        `stemma.models.masks.ReadingCache`."""
        if attention_mask is None:
            if self._padded:
                raise InvalidBatchError(
                    "the rows of this cache have different lengths, so the model needs the attention mask of the whole "
                    "rows, padded on the left, to tell their positions."
                )
            return self._longest
        expected = (self.batch_size, self.get_seq_length() + new_tokens)
        if attention_mask.shape[0] != self.batch_size:
            raise self._other_rows(attention_mask.shape[0])
        if attention_mask.shape != expected:
            raise InvalidBatchError(
                f"the attention mask must be {expected}, one column for each token so far (the cached ones included) "
                f"and each new one, got {tuple(attention_mask.shape)}. Give whole rows, padded on the left."
            )
        if self._padded and not self.positions_given:
            raise UnsupportedModelError(
                f"{self.label} takes no position_ids, so in rows of different lengths new tokens would be counted "
                "from the padding. Give rows of one length, or one row at a time."
            )
        if self.new_columns > 0:  # checked in full at first; later only the columns that came in since
            fits = all(map(all, attention_mask[:, -new_tokens:].tolist()))
        else:
            column = torch.arange(expected[1], device=attention_mask.device)
            wanted = column >= torch.from_numpy(self.pads).to(attention_mask.device)[:, None]
            fits = torch.equal(attention_mask.bool(), wanted)
        if not fits:
            raise InvalidBatchError(
                "the attention mask hides other tokens than the padding on the left that the rows of this cache have."
            )
        return self._longest

    def follow(self, rows: Tensor, *, first: bool, whole: bool) -> None:
        """Note the rows that `generate` goes on with, and refuse at first such as do not continue what is held.

        Args:
            rows: `(rows, columns)` ids, padded on the left.
            first: the call that begins a generation.
            whole: they begin with what is held; otherwise they follow it.

        Raises:
            InvalidBatchError: names the first token that differs, and the way out.
        """
        held = self.get_seq_length()
        if first and rows.shape[0] != self.batch_size:
            raise self._other_rows(rows.shape[0])
        shown = self.shown[:, :held].to(rows.device)
        if first and whole:
            way_out = (
                "A cache goes on with the rows that it has decoded: for another question about its prompt call "
                "cache.reset() first, for another prompt make another cache."
            )
            if rows.shape[1] <= held:
                raise InvalidBatchError(
                    f"the rows have {rows.shape[1]} tokens, padding included, and the cache holds {held}, so there is "
                    f"nothing new to go on from. {way_out}"
                )
            column = torch.arange(shown.shape[1], device=rows.device)
            real = column >= torch.from_numpy(self.pads).to(rows.device)[:, None]
            differing = ((rows[:, : shown.shape[1]] != shown) & real).nonzero()
            if len(differing):
                row, column = differing[0].tolist()
                raise InvalidBatchError(
                    f"row {row} does not continue what the cache holds: its token {column - int(self.pads[row])} is "
                    f"{int(rows[row, column])}, and in the cache it is {int(shown[row, column])}. {way_out}"
                )
        if whole or not held:
            self.shown = rows
        elif shown.shape[1] == held:
            self.shown = torch.cat([shown, rows], dim=1)

    def _other_rows(self, rows: int) -> InvalidBatchError:
        return InvalidBatchError(
            f"the cache was made for {self.batch_size} rows, and {rows} were given. For several samples or beams of "
            "each row call cache.batch_repeat_interleave first."
        )

    def check_read(self) -> None:
        """Refuse a model of which a layer took the cache's keys elsewhere than to our attention.

        Raises:
            UnsupportedModelError: names the layer.
        """
        if self.unread is not None:
            raise UnsupportedModelError(
                f"layer {self.unread} of {self.label} put its keys into the cache but did not attend through it, "
                f"{self._loss}. (After stemma.disable, no layer finds it.)"
            )

    def check_module(self, module: nn.Module) -> None:
        """Refuse the attention of another model.

        Raises:
            InvalidBatchError: names both.
        """
        if module not in self._modules:
            raise InvalidBatchError(
                f"the cache was made with another model ({self.label}) than the one that reads it with "
                f"{type(module).__name__}. A copy is another model; make the cache with the one that decodes."
            )

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, which begins with this call and would count tokens wrongly.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} is not made for assisted decoding; leave out assistant_model, "
            "prompt_lookup_num_tokens, assistant_early_exit and use_mtp, or generate without past_key_values."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowsCache":
        """A cache that goes on by itself, of the same model: copying a cache that holds a prompt, for each of many
        continuations, is a habit of users of transformers."""
        memo.update((id(module), module) for module in self._modules)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        for layer in twin.layers:
            layer.owner = ref(twin)
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` be what row `beam_idx[i]` was."""
        self.shown = self.shown[beam_idx.to(self.shown.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` new tokens.

        Raises:
            ValueError: a positive number, or more than there are new tokens.
        """
        new = self.new_columns
        if not -new <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop takes the negative number of new tokens to remove, of which there are {new}; got "
                f"{tokens_to_remove}. The prompt stays."
            )
        for layer in self.layers:
            layer.seen += tokens_to_remove
        self.shown = self.shown[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Forget all new tokens; the prompt and its rows stay, for the next question about it."""
        for layer in self.layers:
            layer.seen = self.prompt_length
        self.shown, self.unread = self.shown[:, : self.prompt_length], None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, the copies side by side."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))
