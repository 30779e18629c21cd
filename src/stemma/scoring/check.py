"""Verification: is the shared forward of this model, on this machine, as exact as the plain one?

The self-test of `stemma.enable` is a short look; `check` is the whole comparison behind `stemma check`:
log-probabilities, every parameter's gradient, time and memory.
"""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError
from stemma.models.adapter import base_model, in_mode, input_device
from stemma.models.limits import max_positions, model_shape, vocabulary_size
from stemma.models.rounding import higher_precision, in_higher_precision, rounded_anew, rounding_margin
from stemma.prefix.economy import economy
from stemma.prefix.tree import PrefixTree
from stemma.scoring.enable import while_enabled
from stemma.scoring.forward import ForwardSettings, Targets, plain_forward, tree_forward
from stemma.scoring.refusals import check_model

__all__ = ["CheckReport", "check"]

_MARGIN = 3.0
"""How many times farther from the higher precision than the plain computation the shared one may be."""

_CPU_FLOPS = 5e11
"""Of a forward and backward over the default batch on a CPU."""


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
    """Largest difference between shared and plain, nats."""
    max_gradient_difference: float
    """Largest difference between shared and plain over parameters, relative to the norm of the gradient."""
    worst_parameter: str
    reference: str
    """What both are compared with: the plain computation in a higher precision ("float64", "float32"), or "" where the
    memory or the time for one is not there."""
    logprob_error: float
    """Root mean square, nats: shared from the reference. Without a reference: shared from plain."""
    plain_logprob_error: float
    """Root mean square, nats: plain from the reference. Without a reference: plain from plain with other rounding."""
    gradient_error: float
    """Like `logprob_error`, of the worst parameter's gradient, relative to its norm."""
    plain_gradient_error: float
    """Like `plain_logprob_error`, of the worst parameter's gradient, relative to its norm."""
    margin: float
    """How many times the plain error the shared one may be."""
    time_ratio: float
    """Plain over shared: forward and backward, median of runs taken in turns. Above 1, sharing is faster."""
    memory_ratio: float
    """Plain over shared: peak device memory on CUDA, bytes saved for the backward elsewhere."""
    flops_ratio: float
    """The bound on the time ratio."""

    @property
    def ok(self) -> bool:
        """Shared is as close to the reference as plain, up to the margin: it is off by rounding alone."""
        return (
            self.logprob_error <= self.margin * self.plain_logprob_error
            and self.gradient_error <= self.margin * self.plain_gradient_error
        )

    def summary(self) -> str:
        """One sentence."""
        return (
            f"Log-probabilities are {self._errors(self.logprob_error, self.plain_logprob_error, ' nats')}, gradients "
            f"{self._errors(self.gradient_error, self.plain_gradient_error, ' relative')} in '{self.worst_parameter}'."
        )

    def _errors(self, shared: float, plain: float, unit: str) -> str:
        if self.reference:
            return f"{shared:.1e}{unit} off {self.reference} (plain {plain:.1e})"
        return f"{shared:.1e}{unit} off plain (its own rounding {plain:.1e})"

    def __str__(self) -> str:
        close = f"as close to {self.reference} as the plain one" if self.reference else "no more than its own rounding"
        return "\n".join(
            [
                f"model type            {self.model_type} ({self.dtype}, {self.device})",
                f"batch                 {self.num_sequences} sequences, {self.total_tokens} tokens, "
                f"{self.unique_tokens} encoded once",
                f"log-probabilities     {self._errors(self.logprob_error, self.plain_logprob_error, ' nats')}, at most "
                f"{self.max_logprob_difference:.1e} apart",
                f"gradients             {self._errors(self.gradient_error, self.plain_gradient_error, ' relative')}, "
                f"worst in {self.worst_parameter}",
                f"time                  {_times(self.time_ratio, 'faster', 'slower')} shared (FLOPs bound "
                f"{self.flops_ratio:.2f} times faster)",
                f"memory                {_times(self.memory_ratio, 'less', 'more')} shared",
                "verdict               "
                + (f"exact to rounding: {close}" if self.ok else "NOT EXACT: use the plain forward"),
            ]
        )


def _times(ratio: float, above: str, below: str) -> str:
    """A ratio in words that hold on both sides of 1."""
    return f"{ratio:.2f} times {above}" if ratio >= 1 else f"{1 / max(ratio, 1e-12):.2f} times {below}"


def _random_tree(model: nn.Module, seed: int) -> PrefixTree:
    """Two random prompts of 256 tokens with four random responses of 64, in this proportion shorter where the model has
    fewer positions, or where a pass over them would take minutes on a CPU."""
    inner, prompt, response = base_model(model), 256, 64
    sizes = [1.0]
    limit = max_positions(model)
    if limit is not None:
        sizes.append(limit / (prompt + response))
    if input_device(model).type == "cpu":
        flops = 6.0 * sum(p.numel() for p in inner.parameters()) * 8 * (prompt + response)
        sizes.append(max(_CPU_FLOPS / flops, 1 / 8))
    random = np.random.default_rng(seed)
    size, vocabulary = min(sizes), vocabulary_size(model)

    def run(length: int) -> np.ndarray:
        return random.integers(0, vocabulary, size=int(length * size))

    prompts = [run(prompt) for _ in range(2)]
    return PrefixTree.from_groups(prompts, [[run(response) for _ in range(4)] for _ in range(2)])


def _cut(tree: PrefixTree, max_tokens: int | None) -> PrefixTree:
    """The first sequences, as many as make a padded batch of at most `max_tokens`; at least one."""
    padded = np.maximum.accumulate(tree.lengths) * np.arange(1, tree.num_sequences + 1)
    fit = tree.num_sequences if max_tokens is None else max(1, int((padded <= max_tokens).sum()))
    return tree if fit == tree.num_sequences else tree.subset(np.arange(fit))


_Step = tuple[Tensor, dict[str, Tensor]]
"""Log-probabilities `(S,)` and the gradient of each parameter."""


def check(
    model: nn.Module,
    tree: PrefixTree | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    max_tokens: int | None = 8192,
    max_seconds: float | None = 120.0,
    progress: bool = False,
) -> CheckReport:
    """Compare shared and plain forward and backward on one batch: values, gradients, time and memory.

    Both are compared with the plain computation in a higher precision (float64 for float32, float32 for bfloat16 and
    float16), so that rounding is not taken for an error. It costs `1 + repeats` plain passes, as many shared ones,
    and one plain pass in the higher precision. The model comes back as it was: modes, gradients and, if it was not
    enabled before, its attention implementation.

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    tree = stemma.PrefixTree.from_groups([list(range(100))], [[[7, 8, 9], [7, 5]]])
    report = stemma.check(tiny_model("llama"), tree)
    print(report.ok, report.reference)
    # prints: True float64
    ```

    Args:
        model: a causal language model of transformers.
        tree: the batch (default: two random prompts of 256 tokens with four random responses of 64; shorter for large
            models on a CPU).
        repeats: timed runs of each, taken in turns.
        seed: of the default batch and of the loss's weights.
        max_tokens: of a larger batch only the first sequences are taken, up to so many tokens with padding.
        max_seconds: no further timed run, and no higher precision, is begun when it would probably end later.
        progress: say on stderr what is done and how long it takes.

    Raises:
        UnsupportedModelError: the model cannot run over a tree at all.
        NonFiniteError: its logits are NaN or infinite.
        InvalidBatchError: no token of the batch is scored.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    tree = _random_tree(model, seed) if tree is None else _cut(tree, max_tokens)
    if not tree.scored.any():
        raise InvalidBatchError(
            "no token of the batch is scored, so there is nothing to compare: give a sequence of at least two tokens, "
            "or a prompt with a response that is not empty."
        )
    inner = base_model(model)
    device = input_device(model)
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal(int(tree.scored.sum()))).to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.grad for name, p in parameters.items()}
    targets, settings, everything = Targets.of(tree), ForwardSettings(), np.arange(tree.num_sequences)
    begin = time.perf_counter()

    def say(text: str) -> None:
        if progress:
            print(f"{time.perf_counter() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)

    def in_time(seconds: float) -> bool:
        return max_seconds is None or time.perf_counter() - begin + seconds <= max_seconds

    def shared() -> Tensor:
        return targets.gather(tree_forward(model, tree, targets, settings)[0])

    def plain() -> Tensor:
        return plain_forward(model, tree, everything, settings)[0]

    def step(forward: Callable[[], Tensor], inside: AbstractContextManager[object] | None = None) -> _Step:
        for parameter in parameters.values():
            parameter.grad = None
        with inside or nullcontext():
            logprobs = forward()
            if logprobs.requires_grad:
                (logprobs * weights).sum().backward()
            found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            for parameter in parameters.values():  # in the precision that it has inside
                parameter.grad = None
        return logprobs.detach(), found

    def seconds_of(forward: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        step(forward)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    try:
        with while_enabled(model), torch.enable_grad(), in_mode(model, training=False):
            check_model(model)
            say(
                f"{tree.num_sequences} sequences of {tree.total_tokens} tokens, {tree.unique_tokens} distinct: "
                f"{2 + repeats} plain passes forward and backward, {1 + repeats} shared"
            )
            start = time.perf_counter()
            of_plain, plain_memory = _memory(lambda: step(plain), device)
            took = time.perf_counter() - start
            say(f"plain pass: {took:.1f} s")
            of_shared, shared_memory = _memory(lambda: step(shared), device)
            say("shared pass")
            wide = higher_precision(inner) if in_time(5 * took) else None
            reference: _Step | None = None
            if wide is not None:
                with suppress(RuntimeError, TypeError, NotImplementedError):  # not every layer computes in every type
                    reference = step(plain, in_higher_precision(inner, wide))
                    say(f"plain pass in {str(wide).removeprefix('torch.')}")
            if reference is None:
                rounded = step(plain, rounded_anew(inner))
                say("plain pass with other rounding")
            times: list[tuple[float, float]] = []
            while len(times) < repeats and (not times or in_time(sum(times[-1]))):
                turn = (plain, shared) if len(times) % 2 == 0 else (shared, plain)
                seconds = {forward: seconds_of(forward) for forward in turn}
                times.append((seconds[plain], seconds[shared]))
                say(f"timed: plain {seconds[plain]:.2f} s, shared {seconds[shared]:.2f} s")
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    if reference is not None:
        errors, plain_errors = _errors(of_shared, reference), _errors(of_plain, reference)
        margin = _MARGIN
    else:
        errors, plain_errors = _errors(of_shared, of_plain), _errors(rounded, of_plain)
        margin = rounding_margin(inner.dtype)
    plain_time, shared_time = np.median(np.array(times), axis=0)
    return CheckReport(
        model_type=inner.config.model_type,
        dtype=str(inner.dtype).removeprefix("torch."),
        device=str(device),
        num_sequences=tree.num_sequences,
        total_tokens=tree.total_tokens,
        unique_tokens=tree.unique_tokens,
        max_logprob_difference=float((of_plain[0] - of_shared[0]).abs().max()),
        max_gradient_difference=_errors(of_shared, of_plain)[1],
        worst_parameter=errors[2],
        reference="" if reference is None else str(wide).removeprefix("torch."),
        logprob_error=errors[0],
        plain_logprob_error=plain_errors[0],
        gradient_error=errors[1],
        plain_gradient_error=plain_errors[1],
        margin=margin,
        time_ratio=float(plain_time / shared_time),
        memory_ratio=plain_memory / max(shared_memory, 1),
        flops_ratio=economy(tree, model_shape(inner)).flops_ratio,
    )


def _errors(found: _Step, expected: _Step) -> tuple[float, float, str]:
    """Root mean square of log-probabilities; the worst parameter's gradient, relative to its norm or to a thousandth of
    the largest one (some gradients are zero but for rounding); and its name."""
    norms = {name: float(gradient.double().norm()) for name, gradient in expected[1].items()}
    least = max(1e-3 * max(norms.values(), default=0.0), 1e-30)
    worst, where = 0.0, "none"
    for name, gradient in expected[1].items():
        got = found[1].get(name, torch.zeros_like(gradient))
        error = float((got.double() - gradient.double()).norm()) / max(norms[name], least)
        if not error <= worst:
            worst, where = error, name
    return float((found[0].double() - expected[0].double()).square().mean().sqrt()), worst, where


def _memory(run: Callable[[], _Step], device: torch.device) -> tuple[_Step, int]:
    """What it returns, and peak bytes on CUDA; elsewhere bytes of the distinct storages saved for the backward,
    parameters included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(saved.values())
