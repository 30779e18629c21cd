"""Advantages and losses of group-relative policy optimisation, as pure tensor functions.

Shapes: ``N`` sequences (rows), ``T`` padded completion length. A mask is boolean, true where a completion token counts.
Formulas and option names follow TRL 1.16's ``GRPOTrainer`` (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783; DAPO,
arXiv 2503.14476; GSPO, arXiv 2507.18071; CISPO, arXiv 2506.13585; RLOO, arXiv 2402.14740). One thing is changed: the
denominator of the loss is part of a weight per token that `token_weights` computes **once for the whole optimiser batch
over all ranks**, so that neither accumulation nor the number of ranks can change the loss. Any floating dtype works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from stemma.rl._config import ImportanceSamplingLevel, LossType, ScaleRewards

STD_EPSILON = 1e-4  # added to a standard deviation of rewards before dividing, as TRL does


def group_relative(
    rewards: Tensor, group_id: Tensor, *, scale_rewards: ScaleRewards = "group", all_rewards: Tensor | None = None
) -> Tensor:
    """Advantage of each sequence relative to its group: ``A_i = (r_i - mean) / (std + 1e-4)``.

    Args:
        rewards: (N,) float, NaN where a completion cannot be scored. Such a row gets advantage 0 and does not enter
            its group's mean and standard deviation.
        group_id: (N,) int, equal within a group.
        scale_rewards: "group" divides by the unbiased standard deviation of the group, "batch" by that of
            `all_rewards`, "none" does not divide (Dr. GRPO).
        all_rewards: (M,) float, the rewards of all ranks for "batch"; `rewards` when not given.

    Returns:
        (N,) advantages in the dtype of `rewards`. A group with equal rewards, or with one reward, gets exactly 0.
    """
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"scale_rewards must be one of {get_args(ScaleRewards)}, got {scale_rewards!r}")
    scored, group, count, total = _group_sums(rewards, group_id)
    deviation = torch.where(scored, rewards - (total / count.clamp(min=1))[group], 0.0)
    # Rounding of the mean must not make an advantage out of equal rewards.
    deviation = torch.where(_equal_rewards(rewards, group, len(count))[group], 0.0, deviation)
    if scale_rewards == "none":
        return deviation
    if scale_rewards == "batch":
        return deviation / (_unbiased_std(rewards if all_rewards is None else all_rewards) + STD_EPSILON)
    variance = torch.zeros_like(count).index_add_(0, group, deviation**2) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt()[group] + STD_EPSILON)


def leave_one_out(rewards: Tensor, group_id: Tensor) -> Tensor:
    """RLOO: ``A_i = r_i - mean of the other rewards of the group``; 0 for a NaN reward or a group with one reward.

    Args:
        rewards: (N,) float, NaN where unscorable.
        group_id: (N,) int, equal within a group.

    Returns:
        (N,) advantages in the dtype of `rewards`.
    """
    scored, group, count, total = _group_sums(rewards, group_id)
    others = (total[group] - rewards) / (count[group] - 1).clamp(min=1)
    single = (count[group] < 2) | _equal_rewards(rewards, group, len(count))[group]
    return torch.where(scored & ~single, rewards - others, 0.0)


def zero_std_fraction(rewards: Tensor, group_id: Tensor) -> Tensor:
    """Share of groups whose scorable rewards are all equal, so that they give no gradient. Scalar."""
    _, group, count, _ = _group_sums(rewards, group_id)
    return _equal_rewards(rewards, group, len(count)).to(rewards.dtype).mean()


def _group_sums(rewards: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,) scored, (N,) dense group index, (groups,) number of scored rewards, (groups,) their sum."""
    if rewards.ndim != 1 or rewards.shape != group_id.shape:
        raise ValueError(
            f"rewards and group_id must be (N,), got {tuple(rewards.shape)} and {tuple(group_id.shape)}; "
            "pass one reward and one group per sequence"
        )
    values, group = torch.unique(group_id, return_inverse=True)
    scored = ~rewards.isnan()
    zeros = rewards.new_zeros(len(values))
    count = zeros.index_add(0, group, scored.to(rewards.dtype))
    total = zeros.index_add(0, group, torch.where(scored, rewards, 0.0))
    return scored, group, count, total


def _equal_rewards(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """(groups,) bool: no two scorable rewards of the group differ."""
    scored = ~rewards.isnan()
    low = rewards.new_full((num_groups,), torch.inf).scatter_reduce(
        0, group, torch.where(scored, rewards, torch.inf), "amin"
    )
    high = rewards.new_full((num_groups,), -torch.inf).scatter_reduce(
        0, group, torch.where(scored, rewards, -torch.inf), "amax"
    )
    return low >= high  # a group without any scored reward has low = inf and high = -inf


def _unbiased_std(rewards: Tensor) -> Tensor:
    scored = rewards[~rewards.isnan()]
    return scored.std() if scored.numel() > 1 else scored.new_zeros(())


def token_weights(
    mask: Tensor, loss_type: LossType, *, num_sequences: int, num_tokens: int, max_completion_length: int
) -> Tensor:
    """The weight of every token in the loss, denominators included: ``loss = sum(token_loss * weights)``.

    ========== ===================================================================================================
    grpo       ``mask / (num_sequences * tokens of the row)``: mean over sequences of the mean over their tokens
    dr_grpo    ``mask / (num_sequences * max_completion_length)``
    dapo cispo ``mask / num_tokens``: mean over the tokens of the optimiser batch
    bnpo       ``mask / num_tokens`` too, but its caller passes the tokens of the micro-batch times the number of
               micro-batches: the one loss type whose result depends on the split, kept because TRL has it
    ========== ===================================================================================================

    Args:
        mask: (N, T) bool, the tokens that count, of any part of the optimiser batch.
        loss_type: see the table.
        num_sequences: sequences of the whole optimiser batch, all ranks.
        num_tokens: true entries of the mask of the whole optimiser batch, all ranks.
        max_completion_length: the constant of dr_grpo, in tokens.

    Returns:
        (N, T) float64 weights, 0 where the mask is false.
    """
    weights = mask.to(torch.float64)
    if loss_type == "grpo":
        return weights / (weights.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))
    if loss_type == "dr_grpo":
        return weights / (max(num_sequences, 1) * max_completion_length)
    if loss_type in ("dapo", "cispo", "bnpo"):
        return weights / max(num_tokens, 1)
    raise ValueError(f"loss_type must be one of {get_args(LossType)}, got {loss_type!r}")


@dataclass
class TokenLoss:
    """Loss of each token before weighting, and what to log about it. Shapes (N, T), or (N, 1) for sequence level."""

    loss: Tensor
    """Clipped policy loss plus ``beta`` times the KL term."""
    kl: Tensor | None
    """(N, T) KL term that entered the loss (without beta), or None without a reference."""
    clipped_low: Tensor
    """Bool: ratio below ``1 - epsilon`` with a negative advantage, so this token has no policy gradient."""
    clipped_high: Tensor
    """Bool: ratio above ``1 + epsilon_high`` (cispo: above ``epsilon_high``) with a positive advantage."""


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
    use_bias_correction_kl: bool = True,
) -> TokenLoss:
    """Clipped policy-gradient loss of every token.

    With ``ratio = exp(logprobs - old_logprobs)`` per token, or the exponential of its masked mean per sequence (GSPO):
    ``loss = -min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta * kl``; for "cispo"
    ``loss = -min(ratio, epsilon_high).detach() A logprobs + beta * kl``. The KL term is the k3 estimate
    ``exp(d) - d - 1`` with ``d = ref_logprobs - logprobs``, multiplied by the ratio when `use_bias_correction_kl`
    (DeepSeek-V3.2, arXiv 2512.02556), because k3 alone has the wrong gradient.

    Args:
        logprobs: (N, T) log-probabilities under the policy, differentiable.
        old_logprobs: (N, T) log-probabilities under the policy that sampled, constant.
        advantages: (N,) or (N, T).
        mask: (N, T) bool, the tokens that count (needed for the sequence mean).
        epsilon_high: `epsilon` when None; "cispo" requires it.
        delta: upper bound of the ratio, also for negative advantages; None for none.
        ref_logprobs: (N, T), required when beta > 0.
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    log_ratio = logprobs - old_logprobs
    if importance_sampling_level == "sequence":
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / count
    elif importance_sampling_level != "token":
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
    ratio = log_ratio.exp()

    kl = None
    if beta != 0.0:
        if ref_logprobs is None:
            raise ValueError(f"beta={beta} needs ref_logprobs, got None; score the batch with the reference model")
        difference = ref_logprobs - logprobs
        kl = difference.exp() - difference - 1
        kl = kl * ratio if use_bias_correction_kl else kl

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
    if kl is not None:
        loss = loss + beta * kl
    return TokenLoss(loss, kl, clipped_low, clipped_high)


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
