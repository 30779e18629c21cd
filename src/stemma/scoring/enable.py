"""Switch a model to tree attention and back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from stemma.models.adapter import IMPLEMENTATION_PREFIX, base_model, implementations, is_enabled, register
from stemma.models.rounding import is_materialised
from stemma.models.support import not_dispatching, refuse_compiled_parts, refuse_unsuitable
from stemma.scoring.self_test import SelfTest

__all__ = ["disable", "enable", "while_enabled"]

_lock = threading.RLock()
"""Held while a model changes its attention implementation."""


def enable(model: Any, *, self_test: bool = True) -> Any:
    """Let a Hugging Face decoder run over prefix trees; everything else about the model stays as it is.

    Call this before threads share the model: switching attention under another thread's forward is not safe.

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    model = stemma.enable(tiny_model("qwen3"))  # or AutoModelForCausalLM.from_pretrained(...)
    print(model.config._attn_implementation)
    # prints: stemma_sdpa
    stemma.disable(model)
    ```

    Args:
        model: a causal language model of transformers, plain or wrapped (PEFT, DDP, FSDP). Changed in place: its
            attention implementation becomes a dispatching one around the present one, in each part of the model.
        self_test: compare a small tree with each of its sequences alone at once (a few short forwards without
            gradient). Skipped for models whose weights are not materialised (meta device, sharded).

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model does not dispatch its attention, is an encoder or an encoder-decoder, or fails
            the self-test; the message names the model type and the reason. The model is left as it was.
        NonFiniteError: the self-test found logits that are NaN or infinite.
    """
    inner = base_model(model)
    with _lock:
        if not is_enabled(model):
            refuse_unsuitable(inner)
            before, after = implementations(inner.config, str), implementations(inner.config, register)
            test = None
            if self_test and is_materialised(inner):
                refuse_compiled_parts(model)
                test = SelfTest(model)  # its reference comes from the model as it is
            try:
                inner.set_attn_implementation(after)
                if not is_enabled(model):
                    raise not_dispatching(inner)
                if test is not None:
                    test.run()
            except BaseException:  # Ctrl-C too
                inner.set_attn_implementation(before)
                raise
    return model


def disable(model: Any) -> Any:
    """Undo `enable`: give the model its original attention implementation back. Returns the model."""
    inner = base_model(model)
    with _lock:
        if is_enabled(model):
            inner.set_attn_implementation(
                implementations(inner.config, lambda name: name.removeprefix(IMPLEMENTATION_PREFIX))
            )
    return model


_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Blocks of `while_enabled` that run on a model now."""


@contextmanager
def while_enabled(model: Any, *, self_test: bool = True) -> Iterator[None]:
    """The model enabled for the length of a block, and then as it was; blocks of several threads may overlap.

    Args:
        model, self_test: as of `stemma.enable`.

    Raises:
        UnsupportedModelError, NonFiniteError: as `stemma.enable`.
    """
    inner = base_model(model)
    with _lock:
        counted = inner in _users or not is_enabled(model)
        if not is_enabled(model):
            enable(model, self_test=self_test)
        if counted:
            _users[inner] = _users.get(inner, 0) + 1
    try:
        yield
    finally:
        with _lock:
            if counted:
                _users[inner] -= 1
                if not _users[inner]:
                    del _users[inner]
                    disable(model)
