"""Advantages and losses of group-relative policy optimisation, as pure tensor functions.

Shapes: `N` sequences (rows), `T` padded completion length. A mask is boolean, true where a completion token counts.
Formulas and option names follow TRL 1.16's `GRPOTrainer` (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783; DAPO,
arXiv 2503.14476; GSPO, arXiv 2507.18071; CISPO, arXiv 2506.13585; RLOO, arXiv 2402.14740). Two things are changed: the
denominator of the loss is part of a weight per token that `token_weights` computes **once for the whole optimiser batch
over all ranks**, so that neither accumulation nor the number of ranks can change the loss; and a ratio per sequence
keeps advantages per token at their tokens (GSPO-token, section 4.3), where TRL averages them over the row. Any floating
dtype works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from stemma.rl.engine.options import ImportanceSamplingLevel, ImportanceSamplingMode, KLEstimator, LossType

__all__ = [
    "TokenLoss",
    "importance_weights",
    "kl_estimate",
    "soft_overlong_punishment",
    "token_loss",
    "token_weights",
    "weighted_rewards",
]


def token_weights(
    mask: Tensor,
    loss_type: LossType,
    *,
    num_sequences: int,
    num_tokens: int,
    max_completion_length: int,
    counted: Tensor | None = None,
) -> Tensor:
    """The weight of every token in the loss, denominators included: `loss = sum(token_loss * weights)`.

    ========== ===================================================================================================
    grpo       `mask / (num_sequences * tokens of the row)`: mean over sequences of the mean over their tokens
    dr_grpo    `mask / (num_sequences * max_completion_length)`
    dapo cispo `mask / num_tokens`: mean over the tokens of the optimiser batch
    bnpo       `mask / num_tokens` too, but its caller passes the tokens of the micro-batch times the number of
               micro-batches: the one loss type whose result depends on the split, kept because TRL has it
    ========== ===================================================================================================

    Args:
        mask: (N, T) bool, the tokens that count, of any part of the optimiser batch.
        loss_type: see the table.
        num_sequences: sequences of the whole optimiser batch, all ranks.
        num_tokens: tokens that count in the denominator, of the whole optimiser batch, all ranks.
        max_completion_length: the constant of dr_grpo, in tokens.
        counted: (N, T) bool, tokens of a row that grpo's denominator counts; `mask` when None.

    Returns:
        (N, T) float64 weights, 0 where the mask is false.
    """
    weights = mask.to(torch.float64)
    if loss_type == "grpo":
        tokens = (mask if counted is None else counted).sum(-1, keepdim=True).clamp(min=1)
        return weights / (tokens * max(num_sequences, 1))
    if loss_type == "dr_grpo":
        return weights / (max(num_sequences, 1) * max_completion_length)
    if loss_type in ("dapo", "cispo", "bnpo"):
        return weights / max(num_tokens, 1)
    raise ValueError(f"loss_type must be one of {get_args(LossType)}, got {loss_type!r}")


@dataclass
class TokenLoss:
    """Loss of each token before weighting, and what to log about it. Shapes (N, T), or (N, 1) for sequence level."""

    loss: Tensor
    """Clipped policy loss plus `beta` times the KL term."""
    kl: Tensor | None
    """(N, T) KL term that entered the loss (without beta), or None without a reference."""
    clipped_low: Tensor
    """Bool: ratio below `1 - epsilon` with a negative advantage, so this token has no policy gradient."""
    clipped_high: Tensor
    """Bool: ratio above `1 + epsilon_high` (cispo: above `epsilon_high`) with a positive advantage."""


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator = "k3", ratio: Tensor | None = None
) -> Tensor:
    """Estimate per token of the KL divergence `KL(policy || reference)` from tokens of the policy that sampled.

    With `d = ref_logprobs - logprobs`: k1 `-d`, k2 `d^2 / 2`, k3 `exp(d) - d - 1` (Schulman 2020,
    "Approximating KL divergence"). What a loss needs is the right gradient, `E[-d * grad logprobs]` over the policy:

    ==== ===================================================== ===================================================
         alone, on policy                                      times `ratio = policy / policy that sampled`
    ==== ===================================================== ===================================================
    k1   `E[grad logprobs]`, which is zero                   right: `E_old[ratio * k1]` is the divergence itself
    k2   right: the derivative of d^2 / 2 is -d grad logprobs  right off policy too, if the ratio is a constant; its
                                                               own gradient would add `E[k2 * grad logprobs]`
    k3   that of KL(reference || policy)                       right: `E_old[ratio * k3]` is the divergence itself
    ==== ===================================================== ===================================================

    Args:
        logprobs: (N, T) under the policy, differentiable.
        ref_logprobs: (N, T) under the reference, constant.
        ratio: (N, T) or (N, 1), differentiable; k2 takes its value only. None: not multiplied (DeepSeek-V3.2, arXiv
            2512.02556, introduced the factor for k3).
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        value = -difference
    elif estimator == "k2":
        value = difference**2 / 2
    elif estimator == "k3":
        value = difference.exp() - difference - 1
    else:
        raise ValueError(f"kl_estimator must be one of {get_args(KLEstimator)}, got {estimator!r}")
    if ratio is None:
        return value
    return value * (ratio.detach() if estimator == "k2" else ratio)


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: ImportanceSamplingMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Constant weights `exp(logprobs - sampling_logprobs)` against a sampler that differs from the trainer's policy.

    Per token, or per sequence the product over its tokens; "truncate" clips a weight to [clip_min, clip_max] (TIS),
    "mask" sets it to 0 outside (MIS, IcePop).

    Args:
        logprobs: (N, T) under the trainer's policy at the time of sampling.
        sampling_logprobs: (N, T) as the sampler saw them; NaN where it did not say.
        mask: (N, T) bool, sampled tokens. All others, forced ones for example, and those with NaN have the ratio 1.

    Returns:
        (N, T), or (N, 1) for the sequence modes.
    """
    if mode not in get_args(ImportanceSamplingMode):
        raise ValueError(f"importance_sampling_mode must be one of {get_args(ImportanceSamplingMode)}, got {mode!r}")
    log_ratio = torch.where(mask & ~sampling_logprobs.isnan(), logprobs - sampling_logprobs, 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    low, high = 0.0 if clip_min is None else clip_min, torch.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: ImportanceSamplingLevel = "token",
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = True,
    sampling_weights: Tensor | None = None,
) -> TokenLoss:
    """Clipped policy-gradient loss of every token.

    With `ratio = exp(logprobs - old_logprobs)` per token, or the exponential of its masked mean per sequence (GSPO):
    `loss = -w min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta * kl`; for "cispo"
    `loss = -w min(ratio, epsilon_high).detach() A logprobs + beta * kl`. `delta` is the bound that dual clip puts on
    the ratio where A < 0 (c = 3 in arXiv 1912.09729); where A > 0 it lies above the clip and changes nothing.

    Args:
        logprobs: (N, T) log-probabilities under the policy, differentiable.
        old_logprobs: (N, T) log-probabilities under the policy that sampled, constant.
        advantages: (N,) or (N, T). With a ratio per sequence, (N, T) makes it GSPO-token: every token has the value of
            the sequence's ratio and the gradient of its own log-probability.
        mask: (N, T) bool, the tokens that count (needed for the sequence mean).
        epsilon_high: `epsilon` when None; "cispo" requires it.
        delta: upper bound of the ratio, also for negative advantages; None for none.
        ref_logprobs: (N, T), required when beta > 0.
        kl_estimator, use_bias_correction_kl: see `kl_estimate`; the correction passes it the ratio.
        sampling_weights: (N, T) or (N, 1) weights w of the policy term, not of the KL term; None: 1.
    """
    log_ratio = logprobs - old_logprobs
    if importance_sampling_level == "sequence":
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / count
        if advantages.ndim == 2:
            log_ratio = log_ratio.detach() + logprobs - logprobs.detach()
    elif importance_sampling_level != "token":
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    ratio = log_ratio.exp()

    if loss_type == "cispo":
        if epsilon_high is None:
            raise ValueError("loss_type='cispo' needs epsilon_high, the ceiling of its weight (ScaleRL: 5.0), got None")
        loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logprobs
        clipped_low = torch.zeros_like(ratio, dtype=torch.bool)
        clipped_high = (ratio > epsilon_high) & (advantages > 0)
    else:
        low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)
        clipped_low = (ratio < low) & (advantages < 0)
        clipped_high = (bounded > high) & (advantages > 0)
    if sampling_weights is not None:
        loss = loss * sampling_weights

    kl = None
    if beta != 0.0:
        if ref_logprobs is None:
            raise ValueError(f"beta={beta} needs ref_logprobs, got None; score the batch with the reference model")
        kl = kl_estimate(
            logprobs, ref_logprobs, estimator=kl_estimator, ratio=ratio if use_bias_correction_kl else None
        )
        loss = loss + beta * kl
    return TokenLoss(loss, kl, clipped_low, clipped_high)


def soft_overlong_punishment(lengths: Tensor, max_completion_length: int, soft_punish_cache: int) -> Tensor:
    """DAPO's penalty for long completions (arXiv 2503.14476, eq. 13): 0 up to `max_completion_length -
    soft_punish_cache` tokens, from there linearly to -1 at `max_completion_length`, and -1 beyond.

    Args:
        lengths: (N,) int, tokens of each completion.
        soft_punish_cache: tokens over which the penalty falls, >= 1.

    Returns:
        (N,) float64 in [-1, 0].
    """
    excess = lengths - (max_completion_length - soft_punish_cache)
    return -(excess.double() / soft_punish_cache).clamp(0.0, 1.0)


def weighted_rewards(rewards: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """Sum over reward functions of weight times reward, per completion; NaN where every function said None.

    Args:
        rewards: per function, one reward per completion; None means that this function cannot score it.
        weights: one weight per function.
    """
    totals = []
    for values in zip(*rewards, strict=True):
        known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        totals.append(sum(known) if known else float("nan"))
    return totals
