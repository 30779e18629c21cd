"""The attention adapter: any Hugging Face decoder that dispatches its attention can run over a prefix tree.

`enable` registers one attention implementation that wraps the model's own and switches by call: with a layout in
the call's keyword arguments it is tree attention, without one it is what the model had before. The implementation is
set once and never toggled around a call, because activation checkpointing runs layers again in the backward, where a
toggle would long be undone. The layout travels as a keyword argument for the same reason; that also keeps LoRA,
autocast and the hooks of DDP and FSDP working, since everything goes through `model(...)`.

Masks are built outside the layers. On a tree call the mask function probes what mask the model asked for and returns a
marker that travels to the layers in the mask's place, so each layer knows its own: causal and sliding-window masks are
the ones tree attention computes; a layer with any other (chunked, bidirectional, blockwise) is refused by name. A first
small forward in `enable` compares the tree with each sequence alone, so a model whose layers mix positions
elsewhere (recurrence, convolution, absolute position offsets) is refused before any work.

A cache of shared prefixes (`stemma.decode.shared_cache`) comes the same way: a model asks its cache for the sizes
of a mask, the next mask function sees which cache was asked, and its marker leads the layers to that cache.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stemma.attention import tree_attention
from stemma.errors import UnsupportedModelError
from stemma.models.layer_attention import (
    attention_with_prefix,
    layer_name,
    observe,
    prefix_attention,
    refuse_other_attention,
    scale_of,
)
from stemma.models.masks import Mask, ReadingCache, asked_cache, probe
from stemma.prefix.layout import Layout

__all__ = [
    "IMPLEMENTATION_PREFIX",
    "LAYOUT_ARGUMENT",
    "TreeCall",
    "base_model",
    "implementations",
    "in_mode",
    "input_device",
    "is_enabled",
    "model_label",
    "register",
    "tree_call",
    "uncompiled",
]

LAYOUT_ARGUMENT = "stemma_call"
"""Keyword argument under which a tree call travels from `model(...)` to every attention function."""

IMPLEMENTATION_PREFIX = "stemma_"
"""What the name of a dispatching implementation begins with; the name of the wrapped one follows."""


@dataclass(eq=False)
class TreeCall:
    """One forward over a layout: what attention functions read, and what they report back."""

    layout: Layout
    context: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each attention module keys and values `(1, key_value_heads, C, head_dim)` of the path above the layout."""
    capture: bool = False
    """Keep each module's keys and values (context included), for calls below this one."""
    captured: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What `capture` kept, shaped as `context`."""
    calls: int = 0
    """Attention calls inside `model(...)`."""
    by_keyword: int = 0
    """Those of them that were handed this object by keyword, as a recomputation in the backward will be too."""
    hidden_graph: bool = False
    """Keys and values were captured without a graph, by reentrant activation checkpointing."""
    running: bool = False
    """Inside `model(...)`, as against a recomputation in the backward."""


_current: ContextVar[TreeCall | None] = ContextVar("stemma_tree_call", default=None)


@contextmanager
def tree_call(call: TreeCall) -> Iterator[TreeCall]:
    """Mark `call` as the running one: mask functions, which get no keyword arguments, look here."""
    token = _current.set(call)
    call.running = True
    try:
        yield call
    finally:
        call.running = False
        _current.reset(token)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (DDP, FSDP, compiled, PEFT).

    Raises:
        UnsupportedModelError: there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT; its other attributes lead past the language-model head
            inner = inner.get_base_model()
            continue
        for name in ("module", "_orig_mod", "base_model", "model"):
            following = getattr(inner, name, None)
            if isinstance(following, nn.Module) and following is not inner:
                inner = following
                break
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} holds no transformers PreTrainedModel. Stemma needs a Hugging Face causal "
                "language model, plain or wrapped by PEFT, DDP or FSDP."
            )
    return inner


def model_label(model: nn.Module) -> str:
    """Class and type of the transformers model, for messages."""
    inner = base_model(model)
    return f"{type(inner).__name__} (model type '{inner.config.model_type}')"


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for the length of a block; then every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given: tree calls and hooks are nothing that a compiled forward could run."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def input_device(model: nn.Module) -> torch.device:
    """The device for token ids: where the embedding runs, which for offloaded weights is not where they lie."""
    embedding = base_model(model).get_input_embeddings()
    runs_on = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)  # of accelerate
    return embedding.weight.device if runs_on is None else torch.device(runs_on)


def is_enabled(model: nn.Module) -> bool:
    """Whether `enable` has been called on the model."""
    return str(_implementation(base_model(model))).startswith(IMPLEMENTATION_PREFIX)


def _implementation(model: PreTrainedModel) -> str:
    """The attention implementation of the text decoder, which may be a part of the model."""
    return str(model.config.get_text_config()._attn_implementation)


def implementations(config: PreTrainedConfig, change: Callable[[str], str]) -> dict[str, Any]:
    """The implementations of a model and its parts, each changed, as `set_attn_implementation` takes them."""
    own = config._attn_implementation
    found: dict[str, Any] = {"": own if own is None else change(own)}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found[name] = implementations(part, change)
    return found


def register(original: str) -> str:
    """Register the dispatching implementation around `original`; registering again changes nothing."""
    original = original.removeprefix(IMPLEMENTATION_PREFIX)
    name = IMPLEMENTATION_PREFIX + original
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | Mask | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call = kwargs.pop(LAYOUT_ARGUMENT, None)
        if isinstance(attention_mask, Mask) and attention_mask.cache is not None:
            return _read(attention_mask, attention_mask.cache, module, query, key, value, **kwargs), None
        if call is not None:
            call.by_keyword += call.running
        else:
            call = _current.get()
        if call is not None:
            return _attend(call, module, query, key, value, attention_mask, **kwargs), None
        observe(module, query, key, value, kwargs.get("scaling"))
        partial = prefix_attention(module, query, kwargs.get("scaling"))
        if partial is not None:
            return attention_with_prefix(module, query, key, value, attention_mask, partial, **kwargs), None
        if original == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[original]
        return function(module, query, key, value, attention_mask, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        call, asked = _current.get(), asked_cache.get()
        asked_cache.set(None)
        if call is not None:
            return probe(kwargs["mask_function"], call.layout.max_length)
        if asked is not None and asked[1:] == (kwargs.get("kv_length"), kwargs.get("q_length")):
            row, first = asked[0].check_mask(kwargs.get("attention_mask"), asked[2])
            if kwargs["mask_function"] is causal_mask_function:
                return Mask(cache=asked[0])
            return replace(probe(kwargs["mask_function"], asked[1] - first, row, first), cache=asked[0])
        function = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
        return None if function is None else function(*args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _attend(
    call: TreeCall,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Tree attention under the signature of transformers; returns `(1, T, heads, value_dim)`."""
    layout, where = call.layout, layer_name(module)
    if isinstance(attention_mask, Mask):
        sliding_window = _window(where, attention_mask)
    elif attention_mask is not None:
        raise UnsupportedModelError(f"{where} received a mask of its own making; a tree call must not carry a mask.")
    refuse_other_attention(where, module, **others)
    if query.shape[2] != layout.num_tokens or key.shape[2] != layout.num_tokens:
        raise UnsupportedModelError(
            f"{where} attends from {query.shape[2]} to {key.shape[2]} positions where the packed row has "
            f"{layout.num_tokens}; cross attention, caches and learned prefix tokens cannot be combined with a tree "
            "call."
        )
    if layout.context:
        if module not in call.context:
            raise UnsupportedModelError(f"{where} has no keys and values for the {layout.context} tokens above it.")
        above_key, above_value = call.context[module]
        key, value = torch.cat([above_key, key], dim=2), torch.cat([above_value, value], dim=2)
    if call.running:
        call.calls += 1
        if call.capture:
            if module in call.captured:
                raise UnsupportedModelError(f"{where} attends twice in one forward, so it cannot be streamed.")
            call.captured[module] = (key, value)
            call.hidden_graph |= not torch.is_grad_enabled()
    partial = prefix_attention(module, query, scaling)
    output = tree_attention(
        query, key, value, layout, scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux, partial=partial
    )
    return output.transpose(1, 2)


def _read(
    mask: Mask,
    cache: ReadingCache,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Attention over a cache under the signature of transformers; returns `(rows, n, heads, value_dim)`."""
    where = layer_name(module)
    window = _window(where, mask)
    refuse_other_attention(where, module, **others)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{where} attends from {query.shape[2]} to {key.shape[2]} positions where both should be the new tokens; "
            "cross attention and learned prefix tokens cannot be combined with shared prefixes."
        )
    partial, scale = prefix_attention(module, query, scaling), scale_of(query, scaling)
    return cache.attend(
        module, query, key, value, scale=scale, window=window, softcap=softcap, sinks=s_aux, partial=partial
    )


def _window(where: str, mask: Mask) -> int | None:
    if mask.refusal:
        raise UnsupportedModelError(f"{where} masks its attention: {mask.refusal}")
    return mask.window
