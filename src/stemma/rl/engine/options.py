"""Options of group-relative policy optimisation, with TRL's names and meanings. Imports no torch."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = [
    "Config",
    "CreditName",
    "Forward",
    "ImportanceSamplingLevel",
    "ImportanceSamplingMode",
    "KLEstimator",
    "Loss",
    "LossType",
    "Optimiser",
    "Sampling",
    "ScaleRewards",
    "SchedulerType",
    "check_fields",
    "require",
]

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
ScaleRewards = Literal["group", "batch", "none"]
CreditName = Literal["grpo", "rloo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
KLEstimator = Literal["k1", "k2", "k3"]
SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup"]


def require(options: Any, name: str, valid: bool, expected: str) -> None:
    """Raise `ValueError` with the field and its value unless `valid`."""
    if not valid:
        raise ValueError(f"{name} must be {expected}; got {getattr(options, name)!r}")


def check_fields(options: Any) -> None:
    """Raise `ValueError` where a field is none of its type's values: whole or finite numbers, bools, names."""
    hints = get_type_hints(type(options))
    for name in (each.name for each in fields(options)):
        hint, value = hints[name], getattr(options, name)
        kinds = (hint,) if isinstance(hint, type) or get_origin(hint) is Literal else get_args(hint)
        accepted = [_accepts(kind, value) for kind in kinds]
        expected = [_EXPECTED.get(kind) or f"one of {', '.join(map(str, get_args(kind)))}" for kind in kinds]
        require(options, name, any(accepted), ", or ".join(expected))


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", NoneType: "None"}


def _accepts(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and math.isfinite(value)
    return isinstance(value, kind) if isinstance(kind, type) else value in get_args(kind)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled."""

    num_generations: int = 8
    """Completions per prompt (the group size G), >= 2. GRPO: 64; DAPO: 16."""
    max_completion_length: int = 512
    """Tokens after which a completion is cut off, >= 1; also the constant that dr_grpo divides by."""
    temperature: float = 1.0
    """Sampling temperature, > 0; log-probabilities are computed at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling: keep the most likely tokens with this total probability, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 keeps all."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample further prompts until the batch is full (DAPO)."""
    max_generation_batches: int = 10
    """Rounds of sampling at most for one batch of dynamic_sampling, >= 2; then dropped groups fill it up. DAPO: 10."""
    importance_sampling_correction: bool = False
    """Weigh tokens by trainer's / sampler's probability: for a sampler with other numerics or older weights."""
    importance_sampling_mode: ImportanceSamplingMode = "sequence_mask"
    """One such weight per token or per sequence; outside its bounds it is clipped (truncate) or set to 0 (mask)."""
    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of the weight, > 0; None: none."""
    importance_sampling_clip_min: float | None = None
    """Lower bound of the weight, >= 0 and below importance_sampling_clip_max; None: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "num_generations", self.num_generations >= 2, "at least 2: advantages compare within a group")
        require(self, "max_completion_length", self.max_completion_length >= 1, "at least 1")
        require(self, "temperature", self.temperature > 0, "above 0")
        require(self, "top_p", 0 < self.top_p <= 1, "in (0, 1]")
        require(self, "top_k", self.top_k >= 0, "at least 0")
        require(self, "max_generation_batches", self.max_generation_batches >= 2, "at least 2: one draws nothing anew")
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        require(self, "importance_sampling_clip_max", high is None or high > 0, "above 0, or None")
        require(self, "importance_sampling_clip_min", low is None or low >= 0, "at least 0, or None")
        require(
            self,
            "importance_sampling_clip_min",
            low is None or high is None or low < high,
            f"below importance_sampling_clip_max={high}",
        )
        require(
            self,
            "importance_sampling_mode",
            low is not None or high is not None or self.importance_sampling_mode.endswith("_mask"),
            "token_mask or sequence_mask without importance_sampling_clip_max and importance_sampling_clip_min",
        )


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Steps, batches and the optimiser."""

    max_steps: int = 100
    """Optimiser steps in all, >= 1."""
    per_device_train_batch_size: int = 64
    """Completions of one micro-batch on one process: a multiple of num_generations, because groups stay whole."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimiser step, >= 1. Losses do not depend on the split (except bnpo's)."""
    steps_per_generation: int | None = None
    """Micro-batches sampled at a time: a multiple of gradient_accumulation_steps; None: that number itself."""
    num_iterations: int = 1
    """Times that each sampled batch is optimised (mu of GRPO), >= 1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW, >= 0. The default is TRL's and learns nothing visible in some hundred steps: try
    3e-6 for all weights, 2e-4 for a LoRA adapter."""
    lr_scheduler_type: SchedulerType = "linear"
    """Course of the learning rate after its warm-up, over max_steps."""
    warmup_steps: int = 0
    """Steps during which the learning rate rises from 0, >= 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on matrices (not on biases and norms), >= 0."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of gradients, in [0, 1)."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean of squared gradients, in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        steps, accumulated = self.steps_per_generation, self.gradient_accumulation_steps
        require(
            self,
            "steps_per_generation",
            steps is None or (steps >= 1 and steps % accumulated == 0),
            f"a positive multiple of gradient_accumulation_steps={accumulated}",
        )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Rewards, advantages and the loss."""

    loss_type: LossType = "dapo"
    """Denominator of the loss: grpo (tokens of the sequence), dr_grpo (max_completion_length), dapo and cispo (tokens
    of the optimiser batch), bnpo (tokens of the micro-batch). cispo also clips the weight instead of the objective."""
    credit: CreditName = "grpo"
    """Baseline of the advantages: the group's mean reward (grpo), or that of the others, not scaled (rloo)."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)."""
    epsilon: float = 0.2
    """Ratios are clipped from below at 1 - epsilon, in (0, 1). With importance_sampling_level=sequence: 3e-4 (GSPO)."""
    epsilon_high: float | None = None
    """Ratios are clipped from above at 1 + epsilon_high, > 0; None: epsilon. DAPO: 0.28. For cispo, which needs it, the
    ceiling of the weight itself, >= 1. ScaleRL: 5."""
    delta: float | None = None
    """Upper bound of the ratio also where the advantage is negative, > 1 + epsilon_high; None: none. INTELLECT-2: 4."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """One ratio per token (GRPO) or per sequence (GSPO)."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference model, >= 0; 0 loads none. DeepSeek-R1: 0.001."""
    kl_estimator: KLEstimator = "k3"
    """Estimate of the KL divergence from d = log reference - log policy: -d (k1), d^2 / 2 (k2), exp(d) - d - 1 (k3)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio (k2: by its value), which makes its gradient the right one (DeepSeek-V3.2).
    Needed by k1, whose own gradient has expectation zero."""
    entropy_coef: float = 0.0
    """Weight of a bonus on the mean entropy of the tokens, in nats; 0: none."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's balancing loss; None: the one of the model's config."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss (DAPO)."""
    soft_punish_cache: int = 0
    """Tokens before max_completion_length over which a penalty falls from 0 to -1, added to the reward; 0: no penalty.
    DAPO: 4096 of 20480."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "epsilon", 0 < self.epsilon < 1, "in (0, 1)")
        require(self, "beta", self.beta >= 0, "at least 0")
        if self.loss_type == "cispo":
            ceiling = "the ceiling of the weight, at least 1, for loss_type=cispo (ScaleRL: 5.0)"
            require(self, "epsilon_high", self.epsilon_high is not None and self.epsilon_high >= 1, ceiling)
            require(self, "delta", self.delta is None, "None for loss_type=cispo, which does not use it")
        else:
            require(self, "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "above 0, or None")
            bound = 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
            valid = self.delta is None or self.delta > bound
            require(self, "delta", valid, f"above 1 + epsilon_high = {bound}, or None")
        require(
            self,
            "scale_rewards",
            self.credit != "rloo" or self.scale_rewards != "batch",
            "none for credit=rloo, which does not divide (the default, group, is ignored)",
        )
        require(
            self,
            "kl_estimator",
            self.kl_estimator != "k1" or self.use_bias_correction_kl,
            "k2 or k3 for use_bias_correction_kl=False: the gradient of k1 alone has expectation zero",
        )


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How the model is run."""

    shared_prefix: bool = True
    """Encode each shared prefix once. False: the plain forward on every row, for comparison; losses are the same."""
    max_tokens: int | None = None
    """Token budget of one forward call; a larger tree is streamed. None: no limit."""
    compare_every: int = 0
    """Every so many steps, first send the beginning of the batch (rows of at most 4,096 tokens, two at least) through
    both forwards, shared and plain, and log losses, differences and times; 0: never. Without sharing these tokens cost
    up to ten times what a step of the same size does."""
    bf16: bool = False
    """Run the forward under bfloat16 autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Seed of sampling, data order and everything else random, in [0, 2^63)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None")
        require(self, "compare_every", self.compare_every >= 0, "at least 0")
        require(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")


@dataclass(frozen=True, kw_only=True)
class Config(Forward, Loss, Optimiser, Sampling):  # the last base has the first fields
    """Options of `Trainer`. Where TRL 1.16's `GRPOConfig` has the concept, name and meaning are TRL's."""

    def __post_init__(self) -> None:
        for group in (Sampling, Optimiser, Loss, Forward):
            group.__post_init__(self)
        require(
            self,
            "per_device_train_batch_size",
            self.per_device_train_batch_size % self.num_generations == 0,
            f"a positive multiple of num_generations={self.num_generations}: it counts completions, and groups stay "
            "whole",
        )
        require(
            self,
            "soft_punish_cache",
            0 <= self.soft_punish_cache <= self.max_completion_length,
            f"in [0, max_completion_length={self.max_completion_length}]",
        )

    @property
    def micro_batches_per_generation(self) -> int:
        """Micro-batches that are sampled at a time on one process."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.micro_batches_per_generation // self.gradient_accumulation_steps * self.num_iterations
