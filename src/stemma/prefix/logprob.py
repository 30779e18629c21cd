"""Log-probabilities and entropies from hidden states, in chunks, so that tokens x vocabulary never exists whole.

One predicting position may have several next tokens (a branch), so scores are asked for as *targets*: (predicting
position, target token). Each position goes through the head once. Forward keeps hidden states; a chunk's logits are
made again in the backward (activation checkpointing of the head alone). When all positions fit into one chunk nothing
is made twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK_ELEMENTS", "chunked_logprobs", "reference_logprobs"]

CHUNK_ELEMENTS = 1 << 25
"""Logits that exist at once: 128 MiB in float32."""

_CACHED_ELEMENTS = 1 << 19
"""Logits whose softmax is taken at once on a CPU: 2 MiB in float32, so that temporaries stay in the cache."""


def reference_logprobs(
    logits: Tensor, target_position: Tensor, target_token: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `chunked_logprobs` computes, from whole logits `(M, V)`. For tests."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs[target_position, target_token], entropies[target_position]


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target_position: Tensor,
    target_token: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy at its position.

    Args:
        head: maps hidden states `(m, hidden)` to logits `(m, V)`: the model's output projection and whatever
            follows.
        hidden: `(M, hidden)`, hidden states of the predicting positions.
        target_position: `(E,)` int64, non-decreasing: row of `hidden` that predicts each target.
        target_token: `(E,)` int64: the predicted token.
        vocabulary: `V`.
        temperature: logits are divided by it; above 0.
        entropy: also give entropies (of the tempered distribution), in nats.
        chunk_elements: number of logits that may exist at once.

    Returns:
        Log-probabilities `(E,)` and entropies `(E,)` or None; float32, or float64 for float64 logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    positions = hidden.shape[0]
    rows = max(1, chunk_elements // vocabulary)

    def part(chunk: Tensor, position: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(chunk)
        if temperature != 1.0:
            logits = logits / temperature
        return _TargetScores.apply(logits, position, token, entropy)

    # Without a position there is one empty chunk, so that the result still has a graph and its gradients are zeros.
    begins = list(range(0, max(positions, 1), rows))
    cuts = torch.searchsorted(target_position, torch.tensor([*begins, positions], device=hidden.device)).tolist()
    logprobs, entropies = [], []
    for number, begin in enumerate(begins):
        targets = slice(cuts[number], cuts[number + 1])
        arguments = (hidden[begin : begin + rows], target_position[targets] - begin, target_token[targets])
        if len(begins) == 1 or not torch.is_grad_enabled():
            scores = part(*arguments)
        else:
            scores = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(scores[0])
        entropies.append(scores[1])
    return torch.cat(logprobs), (torch.cat(entropies) if entropy else None)


class _TargetScores(torch.autograd.Function):
    """`logits (m, V) -> logprobs (e,), entropies (e,)`; saves the logits and one log-sum-exp a row, nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, position: Tensor, token: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        mean = torch.empty_like(total) if entropy else total.new_zeros(0)
        for rows in _slices(logits):
            scores = logits[rows].to(wide)
            total[rows] = torch.logsumexp(scores, dim=-1)
            if entropy:
                mean[rows] = (torch.exp(scores - total[rows, None]) * scores).sum(dim=-1)
        logprobs = logits[position, token].to(wide) - total[position]
        entropies = (total - mean)[position] if entropy else total.new_zeros(0)
        ctx.save_for_backward(logits, total, mean, position, token)
        ctx.entropy = entropy
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        logits, total, mean, position, token = ctx.saved_tensors
        weight = torch.zeros_like(total).index_add_(0, position, grad_logprobs)
        slope = torch.zeros_like(total).index_add_(0, position, grad_entropies) if ctx.entropy else total
        grad = torch.empty(logits.shape, dtype=total.dtype, device=logits.device)
        for rows in _slices(logits):
            part = torch.sub(logits[rows], total[rows, None], out=grad[rows]).exp_()
            if ctx.entropy:
                # d H / d z_v = -p_v (z_v - mean), with mean = sum_v p_v z_v
                part.mul_((mean[rows, None] - logits[rows]) * slope[rows, None] - weight[rows, None])
            else:
                part.mul_(-weight[rows, None])
        grad.index_put_((position, token), grad_logprobs, accumulate=True)
        return grad.to(logits.dtype), None, None, None


def _slices(logits: Tensor) -> list[slice]:
    """Rows that are worked on together: on a CPU few enough to stay in its cache, else all."""
    count = logits.shape[0]
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, count)
    return [slice(begin, min(begin + rows, count)) for begin in range(0, count, rows)]
