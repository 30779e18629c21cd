"""The attention adapter: any Hugging Face decoder that dispatches its attention can run over a prefix tree.

:func:`enable` registers one attention implementation that wraps the model's own and switches by call: with a layout in
the call's keyword arguments it is tree attention, without one it is what the model had before. The implementation is
set once and never toggled around a call, because activation checkpointing runs layers again in the backward, where a
toggle would long be undone. The layout travels as a keyword argument for the same reason; that also keeps LoRA,
autocast and the hooks of DDP and FSDP working, since everything goes through ``model(...)``.

Masks are built outside the layers. On a tree call the mask function probes what mask the model asked for and returns a
marker that travels to the layers in the mask's place, so each layer knows its own: causal and sliding-window masks are
the ones tree attention computes; a layer with any other (chunked, bidirectional, blockwise) is refused by name. A first
small forward in :func:`enable` compares the tree with each sequence alone, so a model whose layers mix positions
elsewhere (recurrence, convolution, absolute position offsets) is refused before any work.

A cache of shared prefixes (:mod:`stemma.models.shared_cache`) comes the same way: a model asks its cache for the sizes
of a mask, the next mask function sees which cache was asked, and its marker leads the layers to that cache.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stemma.attention import tree_attention
from stemma.errors import UnsupportedModelError
from stemma.models.layer_attention import (
    answered,
    observe,
    place,
    prefix_answer,
    refuse_other_attention,
    scale_of,
)
from stemma.models.masks import Mask, ReadingCache, asked_cache, probe
from stemma.prefix.layout import Layout

__all__ = [
    "LAYOUT_ARGUMENT",
    "TreeCall",
    "base_model",
    "disable",
    "enable",
    "is_enabled",
    "refuse_by_structure",
    "tree_call",
]

LAYOUT_ARGUMENT = "stemma_call"
"""Keyword argument under which a tree call travels from ``model(...)`` to every attention function."""

_PREFIX = "stemma_"
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_lock = threading.RLock()
"""Held while a model changes its attention implementation."""


@dataclass(eq=False)
class TreeCall:
    """One forward over a layout: what attention functions read, and what they report back."""

    layout: Layout
    context: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each attention module keys and values ``(1, key_value_heads, C, head_dim)`` of the path above the layout."""
    capture: bool = False
    """Keep each module's keys and values (context included), for calls below this one."""
    captured: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: int = 0
    by_keyword: int = 0
    hidden_graph: bool = False
    """Keys and values were captured without a graph, by reentrant activation checkpointing."""
    running: bool = False
    """Inside ``model(...)``, as against a recomputation in the backward."""


_current: ContextVar[TreeCall | None] = ContextVar("stemma_tree_call", default=None)


@contextmanager
def tree_call(call: TreeCall) -> Iterator[TreeCall]:
    """Mark ``call`` as the running one: mask functions, which get no keyword arguments, look here."""
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


def is_enabled(model: nn.Module) -> bool:
    """Whether :func:`enable` has been called on the model."""
    return str(_implementation(base_model(model))).startswith(_PREFIX)


def _implementation(model: PreTrainedModel) -> str:
    """The attention implementation of the text decoder, which may be a part of the model."""
    return str(model.config.get_text_config()._attn_implementation)


def enable(model: Any, *, verify: bool = False, self_test: bool = True) -> Any:
    """Let a Hugging Face decoder run over prefix trees; everything else about the model stays as it is.

    Call this before threads share the model: switching attention under another thread's forward is not safe.

    Args:
        model: a causal language model of transformers, plain or wrapped (PEFT, DDP, FSDP). Changed in place: its
            attention implementation becomes a dispatching one around the present one, in each part of the model.
        verify: compare the first batch given to :func:`stemma.score` with the plain forward, and fall back to the plain
            forward with a warning should they differ.
        self_test: compare a small tree with each of its sequences alone at once (a few short forwards without
            gradient). Skipped for models whose weights are not materialised (meta device, sharded).

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model does not dispatch its attention, is an encoder or an encoder-decoder, or fails
            the self-test; the message names the model type and the reason. The model is left as it was.
    """
    inner = base_model(model)
    with _lock:
        if not is_enabled(model):
            _refuse_unsuitable(inner)
            before, after = _implementations(inner.config, str), _implementations(inner.config, _register)
            test = None
            if self_test and _materialised(inner):
                from stemma.models.verify import SelfTest

                test = SelfTest(model)  # its reference comes from the model as it is
            try:
                inner.set_attn_implementation(after)
                if not is_enabled(model):
                    raise _not_dispatching(inner)
                if test is not None:
                    test.run()
            except BaseException:  # Ctrl-C too
                inner.set_attn_implementation(before)
                raise
        inner._stemma_verify = verify
    return model


def disable(model: Any) -> Any:
    """Undo :func:`enable`: give the model its original attention implementation back. Returns the model."""
    inner = base_model(model)
    with _lock:
        if is_enabled(model):
            inner.set_attn_implementation(_implementations(inner.config, lambda name: name.removeprefix(_PREFIX)))
    return model


def _implementations(config: PreTrainedConfig, change: Callable[[str], str]) -> dict[str, Any]:
    """The implementations of a model and its parts, each changed, as `set_attn_implementation` takes them."""
    own = config._attn_implementation
    found: dict[str, Any] = {"": own if own is None else change(own)}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found[name] = _implementations(part, change)
    return found


def _not_dispatching(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_label(model)} does not dispatch its attention through transformers' AttentionInterface, so its attention "
        "cannot be computed over a tree. Use a model type listed as exact in docs/support.md."
    )


def _label(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model type '{model.config.model_type}')"


def _refuse_unsuitable(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_label(model)} is an encoder-decoder; a prefix tree needs a decoder-only causal language model."
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise UnsupportedModelError(
            f"{_label(model)} has no single language-model head. Load it with AutoModelForCausalLM."
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{_label(model)} attends in both directions; prefixes can be shared only under causal attention."
        )
    if getattr(config.get_text_config(), "attn_temperature_tuning", False) and config.model_type.startswith("llama4"):
        raise UnsupportedModelError(
            f"{_label(model)} scales its attention by the index in the row instead of position_ids "
            "(attn_temperature_tuning), which in a packed row is another number."
        )
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not any(part._can_set_attn_implementation() for part in parts):
        raise _not_dispatching(model)


def refuse_by_structure(model: nn.Module) -> None:
    """Refuse what config and modules show, without a forward: for models whose self-test has not run.

    A model that passes is not known to be exact; only the self-test and :func:`stemma.check` compare numbers.

    Raises:
        UnsupportedModelError: names the model type and the reason.
    """
    inner = base_model(model)
    _refuse_unsuitable(inner)
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    if getattr(inner, "_is_stateful", False) or kinds:
        found = f"layers of the kind {', '.join(sorted(kinds))}" if kinds else "a state that is carried along"
        raise UnsupportedModelError(
            f"{_label(inner)} has {found}; a prefix tree needs full or sliding-window attention in all layers, because "
            "recurrence, convolution, linear and sparse attention cannot branch with a tree."
        )
    causal = {module.is_causal for module in inner.modules() if hasattr(module, "is_causal")}
    if causal == {False}:
        raise UnsupportedModelError(
            f"{_label(inner)} is an encoder: it attends in both directions; prefixes can be shared only under causal "
            "attention (is_decoder=True in the config of a decoder)."
        )
    parts = [part for part in inner.modules() if isinstance(part, PreTrainedModel)]
    if not any("position_ids" in inspect.signature(part.forward).parameters for part in parts):
        raise UnsupportedModelError(
            f"{_label(inner)} takes no position_ids: it counts positions by itself, which in a tree are others."
        )


def _materialised(model: PreTrainedModel) -> bool:
    return not any(p.device.type == "meta" or isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters())


def _register(original: str) -> str:
    """Register the dispatching implementation around ``original``; registering again changes nothing."""
    original = original.removeprefix(_PREFIX)
    name = _PREFIX + original
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
        answer = prefix_answer(module, query, kwargs.get("scaling"))
        if answer is not None:
            return answered(module, query, key, value, attention_mask, answer, **kwargs), None
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
    """Tree attention under the signature of transformers; returns ``(1, T, heads, value_dim)``."""
    layout, where = call.layout, place(module)
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
    answer = prefix_answer(module, query, scaling)
    output = tree_attention(
        query, key, value, layout, scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux, answer=answer
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
    """Attention over a cache under the signature of transformers; returns ``(rows, n, heads, value_dim)``."""
    where = place(module)
    window = _window(where, mask)
    refuse_other_attention(where, module, **others)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{where} attends from {query.shape[2]} to {key.shape[2]} positions where both should be the new tokens; "
            "cross attention and learned prefix tokens cannot be combined with shared prefixes."
        )
    answer, scale = prefix_answer(module, query, scaling), scale_of(query, scaling)
    return cache.attend(
        module, query, key, value, scale=scale, window=window, softcap=softcap, sinks=s_aux, answer=answer
    )


def _window(where: str, mask: Mask) -> int | None:
    if mask.refusal:
        raise UnsupportedModelError(f"{where} masks its attention: {mask.refusal}")
    return mask.window
