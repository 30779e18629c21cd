"""Switch a model to tree attention and back, and compare a small tree with each sequence alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import StemmaError, UnsupportedModelError
from stemma.models.adapter import IMPLEMENTATION_PREFIX, base_model, implementations, input_device, is_enabled, register
from stemma.models.limits import vocabulary_size
from stemma.models.rounding import higher_precision, in_higher_precision, is_materialised, rounded_anew
from stemma.models.support import not_dispatching, refuse_compiled_parts, refuse_unsuitable
from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import ForwardSettings, Targets, plain_forward, tree_forward

__all__ = [
    "HALF_MARGIN",
    "WIDE_MARGIN",
    "SelfTest",
    "disable",
    "enable",
    "while_enabled",
    "without_dropout",
]


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
        UnsupportedModelError: as `stemma.enable`.
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


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast off, so that weights of one precision are computed with in it; weights of several may need it."""
    device = input_device(model).type
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    with torch.autocast(device, enabled=mixed and torch.is_autocast_enabled(device)):
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a comparison; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


WIDE_MARGIN, HALF_MARGIN = 8.0, 3.0
"""How many times its own rounding a model may be off. Products of half precision are summed in float32 and rounded
once; those of float32 gather an error at each step of the sum."""


class SelfTest:
    """A tree of three levels against each of its sequences alone, without gradients.

    What may differ is the model's own rounding, measured by `stemma.models.rounding.rounded_anew`. A model in
    half precision is compared in float32 too, where the memory is there for it, as its own rounding hides all but large
    errors.

    Made before the attention implementation is changed, so that the references come from the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner = base_model(model)
        random = np.random.default_rng(0)
        stem, limb, *tails = (random.integers(0, vocabulary_size(self.inner), size=size) for size in (9, 4, 7, 6, 8))
        sequences = [[stem, limb, tails[0]], [stem, limb, tails[1]], [stem, tails[2]]]
        self.tree = PrefixTree.from_sequences([np.concatenate(parts) for parts in sequences], min_shared=1)
        self.half = self.inner.dtype in (torch.float16, torch.bfloat16)
        # Packed tokens of the first sequence are the same row with and without a tree.
        first = int(self.tree.lengths[self.tree.order[0]])
        self.behind = torch.from_numpy(self.tree.path[self.tree.scored] >= first)
        self.references: dict[torch.dtype | None, tuple[Tensor, Tensor]] = {None: self._reference(None)}
        wide = higher_precision(self.inner) if self.half else None
        if wide is not None:
            with suppress(RuntimeError, TypeError, NotImplementedError):  # some layers compute in half precision only
                self.references[wide] = self._reference(wide)

    def _reference(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of each sequence alone, and again with other rounding."""
        with self._computing_in(dtype):
            alone = self._alone()
            with rounded_anew(self.inner):
                return alone, self._alone()

    @contextmanager
    def _computing_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """A higher precision, or for None the model's own."""
        higher = nullcontext() if dtype is None else in_higher_precision(self.inner, dtype)
        with higher, torch.no_grad(), without_dropout(self.model), _without_autocast(self.model):
            yield

    def _alone(self) -> Tensor:
        rows = [np.array([index]) for index in range(self.tree.num_sequences)]
        return torch.cat([plain_forward(self.model, self.tree, row, ForwardSettings())[0] for row in rows])

    def run(self) -> None:
        """Compare, now that the model dispatches.

        Raises:
            UnsupportedModelError: they differ by more than rounding, or the model cannot run the tree.
        """
        for dtype, (alone, rounded) in self.references.items():
            with self._computing_in(dtype):
                found = ((self._shared(), "over a prefix tree"), (self._alone(), "once its attention is dispatched"))
            for got, kind in found:
                difference, rounding = self._size(got - alone, dtype), self._size(rounded - alone, dtype)
                margin = HALF_MARGIN if self.half and dtype is None else WIDE_MARGIN
                if not difference <= margin * rounding:
                    raise UnsupportedModelError(
                        f"{self._label} gives other log-probabilities {kind} ({difference:.1e} nats apart, its own "
                        f"rounding explains {margin * rounding:.0e}). Something besides attention mixes or counts "
                        "positions in it: recurrence, convolution, or positions that do not come from position_ids. "
                        "Use the plain forward for it."
                    )

    @property
    def _label(self) -> str:
        return f"{type(self.inner).__name__} (model type '{self.inner.config.model_type}')"

    def _shared(self) -> Tensor:
        targets = Targets.of(self.tree)
        try:
            logprobs, _, _, _ = tree_forward(self.model, self.tree, targets, ForwardSettings())
        except StemmaError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self._label} cannot run over a prefix tree: its forward failed on a packed row without a mask "
                f"({type(error).__name__}: {error}). Use the plain forward for it."
            ) from error
        return logprobs[torch.from_numpy(targets.of_scored).to(logprobs.device)]

    def _size(self, difference: Tensor, dtype: torch.dtype | None) -> float:
        """Of a difference `(S,)` behind the first sequence."""
        behind = difference[self.behind.to(difference.device)].double()
        if dtype is None and len(self.references) > 1:
            # The higher precision tells. Here the median, as in half precision rounding sends tokens to other experts.
            return float(behind.abs().median())
        return float(behind.square().mean().sqrt())
