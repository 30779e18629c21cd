"""Verification: is the shared forward of this model, on this machine, the plain one?

:class:`SelfTest` is the short look that :func:`stemma.enable` takes; :func:`check` is the whole comparison behind
``stemma check``: log-probabilities, every parameter's gradient, time and memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError
from stemma.models.adapter import base_model
from stemma.models.limits import model_shape
from stemma.prefix.economy import economy
from stemma.prefix.tree import PrefixTree
from stemma.scoring.enable import TOLERANCE, while_enabled, without_dropout
from stemma.scoring.forward import ForwardSettings, Targets, plain_forward, tree_forward

__all__ = ["CheckReport", "check"]

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


def check(model: nn.Module, tree: PrefixTree | None = None, *, repeats: int = 3, seed: int = 0) -> CheckReport:
    """Compare shared and plain forward and backward on one batch: values, gradients, time and memory.

    The model comes back as it was: modes, gradients and, if it was not enabled before, its attention implementation.

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    tree = stemma.PrefixTree.from_groups([list(range(100))], [[[7, 8, 9], [7, 5]]])
    report = stemma.check(tiny_model("llama"), tree)
    print(report.ok, report.max_logprob_difference <= report.logprob_tolerance)
    # prints: True True
    ```

    Args:
        model: a causal language model of transformers.
        tree: the batch (default: two random prompts of 256 tokens with four random responses of 64).
        repeats: timed runs of each, taken in turns.
        seed: of the default batch and of the loss's weights.

    Raises:
        UnsupportedModelError: the model cannot run over a tree at all.
        InvalidBatchError: no token of the batch is scored.
    """
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
    targets, settings, everything = Targets.of(tree), ForwardSettings(), np.arange(tree.num_sequences)
    index = torch.from_numpy(targets.of_scored).to(device)

    def shared() -> Tensor:
        return tree_forward(model, tree, targets, settings)[0][index]

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
        with while_enabled(model), torch.enable_grad(), without_dropout(model):
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
        logprob_tolerance=TOLERANCE.get(inner.dtype, 1e-4),
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
