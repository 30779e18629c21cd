"""Verification: is the shared forward of this model, on this machine, the plain one?

:class:`SelfTest` is the short look that :func:`stemma.enable` takes; :func:`check` is the whole comparison behind
``stemma check``: log-probabilities, every parameter's gradient, time and memory.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model, disable, enable, is_enabled
from stemma.models.forward import Edges, ForwardSettings, plain_forward, tree_forward
from stemma.prefix.economy import economy
from stemma.prefix.tree import PrefixTree

__all__ = ["CheckReport", "SelfTest", "check", "while_enabled"]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Largest log-probability difference, in nats, that counts as rounding. float64 models keep float32 inside their "
"norms."""
_GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest difference of a parameter's gradient, relative to the gradient's norm."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Shared against plain, on one batch."""

    model_type: str
    dtype: str
    device: str
    num_sequences: int
    total_tokens: int
    unique_tokens: int
    max_logprob_difference: float
    """Nats."""
    max_gradient_difference: float
    """Over parameters, norm of the difference over norm of the plain gradient."""
    worst_parameter: str
    logprob_tolerance: float
    gradient_tolerance: float
    time_ratio: float
    """Plain over shared: forward and backward, median of runs taken in turns. Above 1, sharing is faster."""
    memory_ratio: float
    """Plain over shared: peak device memory on CUDA, bytes saved for the backward elsewhere."""
    flops_ratio: float
    """The bound on the time ratio."""

    @property
    def ok(self) -> bool:
        """Both differences are within rounding for the dtype."""
        return (
            self.max_logprob_difference <= self.logprob_tolerance
            and self.max_gradient_difference <= self.gradient_tolerance
        )

    def summary(self) -> str:
        """One sentence."""
        return (
            f"Largest differences: log-probability {self.max_logprob_difference:.1e} nats (tolerance "
            f"{self.logprob_tolerance:.0e}), gradient {self.max_gradient_difference:.1e} relative in "
            f"'{self.worst_parameter}' (tolerance {self.gradient_tolerance:.0e})."
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                f"model type            {self.model_type} ({self.dtype}, {self.device})",
                f"batch                 {self.num_sequences} sequences, {self.total_tokens} tokens, "
                f"{self.unique_tokens} encoded once",
                f"log-probabilities     {self.max_logprob_difference:.2e} nats apart (tolerance "
                f"{self.logprob_tolerance:.0e})",
                f"gradients             {self.max_gradient_difference:.2e} relative, worst in {self.worst_parameter} "
                f"(tolerance {self.gradient_tolerance:.0e})",
                f"time                  {_times(self.time_ratio, 'faster', 'slower')} shared (FLOPs bound "
                f"{self.flops_ratio:.2f} times faster)",
                f"memory                {_times(self.memory_ratio, 'less', 'more')} shared",
                f"verdict               {'exact to rounding' if self.ok else 'NOT EXACT: use the plain forward'}",
            ]
        )


def _times(ratio: float, above: str, below: str) -> str:
    """A ratio in words that hold on both sides of 1."""
    return f"{ratio:.2f} times {above}" if ratio >= 1 else f"{1 / max(ratio, 1e-12):.2f} times {below}"


_lock = threading.RLock()
_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Blocks of :func:`while_enabled` that run on a model now."""


@contextmanager
def while_enabled(model: Any, *, self_test: bool = True) -> Iterator[None]:
    """The model enabled for the length of a block, and then as it was; blocks of several threads may overlap.

    Args:
        model, self_test: as of :func:`stemma.enable`.

    Raises:
        UnsupportedModelError: as :func:`stemma.enable`.
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
    device = base_model(model).get_input_embeddings().weight.device.type
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    with torch.autocast(device, enabled=mixed and torch.is_autocast_enabled(device)):
        yield


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a comparison; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _random_tree(model: nn.Module, groups: int, responses: int, prompt: int, response: int, seed: int) -> PrefixTree:
    config = base_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < prompt + response:
        prompt, response = limit * prompt // (prompt + response), limit * response // (prompt + response)
    random = np.random.default_rng(seed)

    def run(length: int) -> np.ndarray:
        return random.integers(0, config.vocab_size, size=length)

    prompts = [run(prompt) for _ in range(groups)]
    return PrefixTree.from_groups(prompts, [[run(response) for _ in range(responses)] for _ in range(groups)])


class SelfTest:
    """A tree of three levels against each of its sequences alone, without gradients.

    Made before the attention implementation is changed, so that the reference comes from the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner = base_model(model)
        vocabulary = int(self.inner.config.get_text_config().vocab_size)
        random = np.random.default_rng(0)
        stem, limb, *tails = (random.integers(0, vocabulary, size=size) for size in (9, 4, 7, 3, 5))
        sequences = [[stem, limb, tails[0]], [stem, limb, tails[1]], [stem, tails[2]]]
        self.tree = PrefixTree.from_sequences([np.concatenate(parts) for parts in sequences], min_shared=1)
        self.alone = self._alone()

    def _alone(self) -> Tensor:
        rows = [np.array([index]) for index in range(self.tree.num_sequences)]
        with torch.no_grad(), _without_dropout(self.model), _without_autocast(self.model):
            return torch.cat([plain_forward(self.model, self.tree, row, ForwardSettings())[0] for row in rows])

    def run(self) -> None:
        """Compare, now that the model dispatches.

        Raises:
            UnsupportedModelError: they differ by more than rounding, or the model cannot run the tree.
        """
        label = f"{type(self.inner).__name__} (model type '{self.inner.config.model_type}')"
        edges = Edges.of(self.tree)
        try:
            with torch.no_grad(), _without_dropout(self.model), _without_autocast(self.model):
                shared, _, _, _ = tree_forward(self.model, self.tree, edges, ForwardSettings())
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{label} cannot run over a prefix tree: its forward failed on a packed row without a mask "
                f"({type(error).__name__}: {error}). Use the plain forward for it."
            ) from error
        shared = shared[torch.from_numpy(edges.of_scored).to(shared.device)]
        tolerance = _TOLERANCE.get(self.inner.dtype, 1e-4)
        for got, kind in ((shared, "over a prefix tree"), (self._alone(), "once its attention is dispatched")):
            difference = float((self.alone - got).abs().max())
            if not difference <= tolerance:
                raise UnsupportedModelError(
                    f"{label} gives other log-probabilities {kind} (up to {difference:.1e} nats, rounding explains "
                    f"{tolerance:.0e}). Something besides attention mixes or counts positions in it: recurrence, "
                    "convolution, or positions that do not come from position_ids. Use the plain forward for it."
                )


def check(model: nn.Module, tree: PrefixTree | None = None, *, repeats: int = 3, seed: int = 0) -> CheckReport:
    """Compare shared and plain forward and backward on one batch: values, gradients, time and memory.

    The model comes back as it was: modes, gradients and, if it was not enabled before, its attention implementation.

    Args:
        model: a causal language model of transformers.
        tree: the batch (default: two random prompts of 256 tokens with four random responses of 64).
        repeats: timed runs of each, taken in turns.
        seed: of the default batch and of the loss's weights.

    Raises:
        UnsupportedModelError: the model cannot run over a tree at all.
        InvalidBatchError: no token of the batch is scored.
    """
    from stemma.models.planner import model_shape

    if tree is not None and not tree.scored.any():
        raise InvalidBatchError(
            "No token of the batch is scored, so there is nothing to compare: give a sequence of at least two tokens, "
            "or a prompt with a response that is not empty."
        )
    inner = base_model(model)
    tree = _random_tree(model, 2, 4, 256, 64, seed) if tree is None else tree
    device = inner.get_input_embeddings().weight.device
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal(int(tree.scored.sum()))).to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.grad for name, p in parameters.items()}
    edges, settings, everything = Edges.of(tree), ForwardSettings(), np.arange(tree.num_sequences)
    index = torch.from_numpy(edges.of_scored).to(device)

    def shared() -> Tensor:
        return tree_forward(model, tree, edges, settings)[0][index]

    def plain() -> Tensor:
        return plain_forward(model, tree, everything, settings)[0]

    def step(forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        for parameter in parameters.values():
            parameter.grad = None
        logprobs = forward()
        if logprobs.requires_grad:
            (logprobs * weights).sum().backward()
        return logprobs.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}

    try:
        with while_enabled(model), torch.enable_grad(), _without_dropout(model):
            plain_memory, shared_memory = _memory(lambda: step(plain), device), _memory(lambda: step(shared), device)
            (plain_logprobs, plain_grads), (shared_logprobs, shared_grads) = step(plain), step(shared)
            worst, where = 0.0, "none"
            for name, expected in plain_grads.items():
                got = shared_grads.get(name, torch.zeros_like(expected))
                error = float((got - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
                if expected.double().norm() > 0 and not error <= worst:
                    worst, where = error, name
            del plain_grads, shared_grads
            times: dict[Callable[[], Tensor], list[float]] = {plain: [], shared: []}
            for turn in range(repeats):
                for forward in (plain, shared) if turn % 2 == 0 else (shared, plain):
                    begin = time.perf_counter()
                    step(forward)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    times[forward].append(time.perf_counter() - begin)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    return CheckReport(
        model_type=inner.config.model_type,
        dtype=str(inner.dtype).removeprefix("torch."),
        device=str(device),
        num_sequences=tree.num_sequences,
        total_tokens=tree.total_tokens,
        unique_tokens=tree.unique_tokens,
        max_logprob_difference=float((plain_logprobs - shared_logprobs).abs().max()),
        max_gradient_difference=worst,
        worst_parameter=where,
        logprob_tolerance=_TOLERANCE.get(inner.dtype, 1e-4),
        gradient_tolerance=_GRADIENT_TOLERANCE.get(inner.dtype, 1e-3),
        time_ratio=float(np.median(times[plain]) / np.median(times[shared])),
        memory_ratio=plain_memory / max(shared_memory, 1),
        flops_ratio=economy(tree, model_shape(inner)).flops_ratio,
    )


def _memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes on CUDA; elsewhere bytes of the distinct storages saved for the backward, parameters included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())
