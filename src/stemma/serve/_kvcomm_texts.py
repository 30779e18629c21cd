"""What the agents of KVCOMM have in common: settings, a model, its texts with their keys and values alone, results."""

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from stemma.cache.anchors import AnchorPool
from stemma.cache.offsets import Layers, Weighting
from stemma.cache.states import States
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model
from stemma.models.fingerprint import active_adapters, fingerprint
from stemma.models.rotary import cached_states, encode, find_rotations
from stemma.serve._recompute import windows
from stemma.serve._template import text_ids

__all__ = ["Config", "Content", "Prefill", "Texts", "Usage", "copied"]


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
    """Share of the reused tokens that "blend" computes anew, in [0, 1]."""
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
    """A text that several agents use; its base is made once, when it is first needed."""

    ids: tuple[int, ...]
    text: str | None
    """None for tokens that an agent generated."""
    origin: Literal["alone", "generated"] = "alone"
    base: Layers | None = None
    """Keys and values alone, as if its first token stood behind the header; None until they are needed."""
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
    """What `generate` continues from: ``model.generate(**prefill.inputs, past_key_values=prefill.cache)``."""

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

    @property
    def inputs(self) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` of the whole prompt, ``(1, length)``."""
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
        UnsupportedModelError: keys of a layer cannot be moved; names the layer. See :func:`find_rotations`.
        InvalidBatchError: the pool belongs to another model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, config: Config | None = None, pool: AnchorPool | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config or Config()
        self.pool = AnchorPool() if pool is None else pool
        self.rotations = find_rotations(model)
        self.window, self.chunk = windows(model)
        self.header = text_ids(tokenizer, self.config.header, special_tokens=True)
        self._known: tuple[Any, dict[str, str]] | None = None
        self.check()

    def check(self) -> None:
        """Refuse a model that has changed since the anchors were made, or would drop activations at random.

        Raises:
            UnsupportedModelError: the model is in training mode.
            InvalidBatchError: says what has changed.
        """
        inner = base_model(self.model)
        if inner.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() first.")
        state = tuple((id(p), p._version) for p in inner.parameters()), active_adapters(inner)
        if self._known is None or self._known[0] != state:
            self._known = state, {**fingerprint(self.model), "header": repr(self.header)}
        self.pool.bind(self._known[1])

    def content(self, text: str) -> Content:
        """A text to be given to several agents.

        Raises:
            InvalidBatchError: no text.
        """
        if not isinstance(text, str):
            raise InvalidBatchError(f"a text is expected, got {type(text).__name__}.")
        return Content(text_ids(self.tokenizer, text), text)

    def base(self, content: Content) -> tuple[Layers, int]:
        """Keys and values of a text alone, with its first token behind the header, and how many tokens were run."""
        with content.lock:
            if content.base is not None:
                return content.base, 0
            begin = len(self.header)
            cache = encode(self.model, [*self.header, *content.ids])
            content.base = copied(cached_states(cache, begin))
            return content.base, begin + len(content.ids)


def copied(layers: Layers) -> Layers:
    """Copies, so that no longer tensor is kept alive."""
    return tuple(States(key.clone(), value.clone()) for key, value in layers)
