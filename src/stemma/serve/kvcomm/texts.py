"""What the agents of KVCOMM have in common: settings, a model, its texts with their keys and values alone, results."""

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from stemma.cache.anchors import AnchorPool
from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers, Weighting
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model
from stemma.models.fingerprint import active_adapters, fingerprint
from stemma.models.rotary import cached_states, encode, find_rotations
from stemma.models.tokens import end_token_ids, text_ids
from stemma.models.weights_state import unsaved_buffers, weights_state
from stemma.serve.kvcomm.recompute import first_layer, token_errors, windows

__all__ = ["Config", "Content", "Prefill", "Texts", "Usage", "copied", "cut"]

_OTHER = 0.1
"""Relative difference of the first layer's keys or values above which tokens are others; rounding is below 0.03."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How texts are reused."""

    gamma: float = 0.3
    """Entropy of the likeness of anchors, over its largest value, above which a text becomes an anchor; in [0, 1]. The
    paper's value."""
    min_anchors: int = 8
    """Anchors as long as a text or longer, known to the agent, below which the text becomes one itself; at least 1. The
    paper's value is 2; a mean over few differences is no better than none."""
    sharpness: float | None = 1000.0
    """Factor on relative distances before their softmax, above 0; None for the published unnormalised distances."""
    temperature: float = 1.0
    """Of the weights of anchors, above 0; the paper's value."""
    weighting: Weighting = "similarity"
    """Whether anchors count by likeness or all alike."""
    top_p: float = 0.9
    """Share of likeness whose anchors are credited with a use, in [0, 1]; the paper's value."""
    max_error: float | None = None
    """Relative error of the second layer's keys, measured on a few tokens, above which nothing is reused; None: not
    measured."""
    recompute: float = 0.15
    """Share of the reused tokens that "blend" computes anew, and "auto" where it reuses, in [0, 1]; 0, the
    paper's, leaves all of them estimates."""
    header: str = ""
    """Text in front of a text that is encoded alone, behind the tokenizer's own first tokens; it keeps those keys out
    of the base that only a first token has."""

    def __post_init__(self) -> None:
        for name in ("gamma", "top_p", "recompute"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.min_anchors < 1:
            raise ValueError(f"min_anchors must be at least 1, got {self.min_anchors}.")
        for name in ("sharpness", "temperature", "max_error"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if self.weighting not in ("similarity", "mean"):
            raise ValueError(f'weighting must be "similarity" or "mean", got {self.weighting!r}.')


@dataclass(eq=False)
class Content:
    """A text that several agents use; its base is made when it is first needed, and again for another model."""

    ids: tuple[int, ...]
    text: str | None
    """None for tokens that an agent generated."""
    origin: Literal["alone", "generated"] = "alone"
    base: Layers | None = None
    """Keys and values alone, as if its first token stood behind the header; None until they are needed."""
    owner: tuple[object, ...] = field(default=(), repr=False)
    """What the base belongs to: `Texts.owner` when it was made."""
    lock: Any = field(default_factory=threading.Lock, repr=False)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one prefill, by what was done for them."""

    prompt: int
    """All of them; the last one is left for `generate`."""
    exact: int
    """Of the template's first piece, whose keys and values were at hand."""
    reused: int
    """Moved and estimated."""
    computed: int
    """Run through the model at their place."""
    encoded: int
    """Run through the model alone, as the base of a text that was new."""
    looked_at: int
    """Run through the first layers only, to see how far off estimates are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
    """What `generate` continues from: `model.generate(**prefill.inputs, past_key_values=prefill.cache)`."""

    ids: list[int]
    cache: DynamicCache
    """Keys and values of all tokens but the last."""
    mode: Literal["dense", "reuse", "blend"]
    """What was done."""
    reason: str
    """Why."""
    usage: Usage
    learned: tuple[str, ...]
    """Placeholders whose texts are anchors for this agent from now on."""
    error: float | None
    """Mean relative error of the second layer's keys over the tokens looked at, before anything was recomputed."""
    spans: dict[str, tuple[int, int]]
    """Where each text stands in the prompt."""
    owner: tuple[object, ...] = field(default=(), repr=False)
    """What the cache belongs to: `Texts.owner` when it was made."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of the whole prompt, `(1, length)`."""
        ids = torch.tensor([self.ids], device=self.cache.layers[0].keys.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Texts:
    """One model, the texts and anchors of its agents.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        config: how texts are reused.
        pool: anchors; a new pool when None.

    Raises:
        UnsupportedModelError: keys of a layer cannot be moved; names the layer. See `find_rotations`.
        InvalidBatchError: the pool belongs to another model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, config: Config | None = None, pool: AnchorPool | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config or Config()
        self.pool = AnchorPool() if pool is None else pool
        self.window, self.chunk = windows(model)
        self.header = tuple(text_ids(tokenizer, self.config.header))
        self._known: tuple[Any, dict[str, str]] | None = None
        self.owner: tuple[object, ...] = ()
        """The model as it was at the last `check`, and the header: what keys and values depend on."""
        self.check()

    def check(self) -> None:
        """Refuse a model that has changed since the anchors were made, or would drop activations at random.

        What counts as a change is said in `stemma.models.weights_state.weights_state`.

        Raises:
            UnsupportedModelError: the model, or a part of it with dropout, is in training mode, or keys of the changed
                model cannot be moved.
            InvalidBatchError: says what has changed.
        """
        inner = base_model(self.model)
        if inner.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() first.")
        for name, module in inner.named_modules():
            if module.training and (getattr(module, "attention_dropout", 0) or _drops(module)):
                raise UnsupportedModelError(f"{name!r} is in training mode and has dropout; call model.eval() first.")
        state = weights_state(self.model), active_adapters(inner)
        known = self._known if self._known is not None and self._known[0] == state else None
        about = self._about(inner) if known is None else known[1]
        self.pool.bind(about)
        if known is None:
            self.rotations = find_rotations(self.model)
            self._known, self.owner = (state, about), (str(inner.device), *sorted(about.items()))

    def _about(self, inner: nn.Module) -> dict[str, str]:
        """What the keys and values of a text depend on."""
        buffers = hashlib.sha256()
        for name, buffer in unsaved_buffers(inner):
            buffers.update(name.encode() + buffer.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
        return {**fingerprint(self.model), "buffers": buffers.hexdigest()[:32], "header": repr(self.header)}

    def content(self, text: str) -> Content:
        """A text to be given to several agents.

        Raises:
            InvalidBatchError: no text.
        """
        if not isinstance(text, str):
            raise InvalidBatchError(f"a text is expected, got {type(text).__name__}.")
        return Content(tuple(text_ids(self.tokenizer, text, special_tokens=False)), text)

    def check_base(self, content: Content) -> None:
        """Refuse a generated text whose keys and values are of another model or header; they cannot be made again.

        Raises:
            InvalidBatchError: says what to do.
        """
        if content.origin == "generated" and content.base is not None and content.owner != self.owner:
            raise InvalidBatchError(
                f"a text of {len(content.ids)} generated tokens came with keys and values of another model or header "
                "(or of this model before it changed), which do not belong here. Generate it again, give it as plain "
                'text, or use mode="dense", which needs its tokens only.'
            )

    def generated(self, prefill: Prefill, sequence: Any) -> tuple[list[int], Layers]:
        """The row that `generate` made of a prefill, without the end-of-sequence token, and what the cache holds of it.

        Raises:
            InvalidBatchError: several rows; not the row of this prompt and cache; the model has changed since.
        """
        rows, held = torch.as_tensor(sequence), cached_states(prefill.cache)
        count, cached = rows.shape[0] if rows.dim() > 1 else 1, held[0].key.shape[0]
        if (count, cached) != (1, 1):
            raise InvalidBatchError(
                f"an answer is one row in a cache of one row, got {count} in a cache of {cached}. Hand on what several "
                "samples or beams have added as plain text."
            )
        self.check()
        if prefill.owner != self.owner:
            raise InvalidBatchError("this prefill is of another model, or of this one before it changed; prefill anew.")
        row, start, length = rows.flatten().tolist(), len(prefill.ids), held[0].key.shape[2]
        if row[:start] != prefill.ids:
            raise InvalidBatchError("the sequence does not begin with the prompt of this prefill; give generate's row.")
        if len(row) > start and row[-1] in end_token_ids(self.model, self.tokenizer):
            row.pop()
        if len(row) == start or length < len(row) - 1:
            raise InvalidBatchError(
                f"the prompt has {start} tokens, the sequence {len(row)} and the cache {length}: nothing was generated "
                "with this cache. Give it to generate as past_key_values, and its row here."
            )
        added = row[start:length]
        if added:
            own = cut(held[:1], start, start + len(added))[0]
            errors = token_errors(first_layer(self.model, added, start), own)
            if float(errors.max()) > _OTHER:
                raise InvalidBatchError(
                    f"token {start + int(errors.argmax())} of the sequence is not the one that the cache holds there. "
                    "Give the row that generate made with this cache."
                )
        return row, held

    def base(self, content: Content) -> tuple[Layers, int]:
        """Keys and values of a text alone, with its first token behind the header, and how many tokens were run.

        Raises:
            InvalidBatchError: as `check` and `check_base`.
        """
        with content.lock:
            if content.base is not None and content.owner == self.owner:
                return content.base, 0
            self.check()
            self.check_base(content)
            begin = len(self.header)
            cache = encode(self.model, [*self.header, *content.ids])
            content.base, content.owner = copied(cached_states(cache, begin)), self.owner
            return content.base, begin + len(content.ids)


def copied(layers: Layers) -> Layers:
    """Copies, so that no longer tensor is kept alive."""
    return tuple(KeyValues(key.clone(), value.clone()) for key, value in layers)


def cut(layers: Layers, begin: int, end: int) -> Layers:
    """Views of the tokens `[begin, end)`."""
    return tuple(KeyValues(key[:, :, begin:end], value[:, :, begin:end]) for key, value in layers)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0
