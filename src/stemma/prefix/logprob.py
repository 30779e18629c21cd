"""Log-probabilities and entropies from hidden states, in chunks, so that tokens x vocabulary never exists whole.

One predicting position may have several next tokens (a branch), so scores are asked for as *edges*: (predicting
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


def reference_logprobs(
    logits: Tensor, edge_position: Tensor, edge_token: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What :func:`chunked_logprobs` computes, from whole logits ``(M, V)``. For tests."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs[edge_position, edge_token], entropies[edge_position]


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    edge_position: Tensor,
    edge_token: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each edge, and the entropy at its position.

    Args:
        head: maps hidden states ``(m, hidden)`` to logits ``(m, V)``: the model's output projection and whatever
            follows.
        hidden: ``(M, hidden)``, hidden states of the predicting positions.
        edge_position: ``(E,)`` int64, non-decreasing: row of ``hidden`` that predicts each edge.
        edge_token: ``(E,)`` int64: the predicted token.
        vocabulary: ``V``.
        temperature: logits are divided by it; above 0.
        entropy: also give entropies (of the tempered distribution), in nats.
        chunk_elements: number of logits that may exist at once.

    Returns:
        Log-probabilities ``(E,)`` and entropies ``(E,)`` or None; float32, or float64 for float64 logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    positions = hidden.shape[0]
    rows = max(1, chunk_elements // vocabulary)

    def part(chunk: Tensor, position: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(chunk)
        if temperature != 1.0:
            logits = logits / temperature
        return _EdgeScores.apply(logits, position, token, entropy)

    begins = list(range(0, positions, rows))
    cuts = torch.searchsorted(edge_position, torch.tensor([*begins, positions], device=hidden.device)).tolist()
    logprobs, entropies = [], []
    for number, begin in enumerate(begins):
        edges = slice(cuts[number], cuts[number + 1])
        arguments = (hidden[begin : begin + rows], edge_position[edges] - begin, edge_token[edges])
        if len(begins) == 1 or not torch.is_grad_enabled():
            scores = part(*arguments)
        else:
            scores = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(scores[0])
        entropies.append(scores[1])
    if not begins:
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return empty, (empty.clone() if entropy else None)
    return torch.cat(logprobs), (torch.cat(entropies) if entropy else None)


class _EdgeScores(torch.autograd.Function):
    """``logits (m, V) -> logprobs (e,), entropies (e,)``; saves the logits and one log-sum-exp a row, nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, position: Tensor, token: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.to(wide)
        total = torch.logsumexp(scores, dim=-1)
        logprobs = scores[position, token] - total[position]
        mean = (torch.exp(scores - total[:, None]) * scores).sum(dim=-1) if entropy else total.new_zeros(0)
        entropies = (total - mean)[position] if entropy else total.new_zeros(0)
        ctx.save_for_backward(logits, total, mean, position, token)
        ctx.entropy = entropy
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        logits, total, mean, position, token = ctx.saved_tensors
        scores = logits.to(total.dtype)
        probabilities = torch.exp(scores - total[:, None])
        weight = torch.zeros_like(total).index_add_(0, position, grad_logprobs)
        if ctx.entropy:
            # d H / d z_v = -p_v (z_v - mean), with mean = sum_v p_v z_v
            slope = torch.zeros_like(total).index_add_(0, position, grad_entropies)
            grad = probabilities * ((mean[:, None] - scores) * slope[:, None] - weight[:, None])
        else:
            grad = probabilities.mul_(-weight[:, None])
        grad.index_put_((position, token), grad_logprobs, accumulate=True)
        return grad.to(logits.dtype), None, None, None
