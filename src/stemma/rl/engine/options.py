"""Options of group-relative policy optimisation, with TRL's names and meanings. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
ScaleRewards = Literal["group", "batch", "none"]
CreditName = Literal["grpo", "rloo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
KLEstimator = Literal["k1", "k2", "k3"]
SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup"]
EntropyScope = Literal["batch", "row"]
PrefixAdvantage = Literal["group", "reference"]
Normalizer = Literal["all", "kept"]
TooLong = Literal["error", "skip"]


def _require(options: Any, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {expected}; got {getattr(options, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `Trainer`. Where TRL 1.16's `GRPOConfig` has the concept, name and meaning are TRL's."""

    max_steps: int = 100
    """Optimiser steps in all, >= 1."""
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

    per_device_train_batch_size: int = 64
    """Completions of one micro-batch on one process: a multiple of num_generations, because groups stay whole."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimiser step, >= 1. Losses do not depend on the split (except bnpo's)."""
    steps_per_generation: int | None = None
    """Micro-batches sampled at a time: a multiple of gradient_accumulation_steps; None: that number itself."""
    num_iterations: int = 1
    """Times that each sampled batch is optimised (mu of GRPO), >= 1."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW, >= 0."""
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

    shared_prefix: bool = True
    """Encode each shared prefix once. False: the plain forward on every row, for comparison; losses are the same."""
    max_tokens: int | None = None
    """Token budget of one forward call; a larger tree is streamed. None: no limit."""
    compare_every: int = 0
    """Every so many steps, also send the batch through the other forward (shared or plain) and log its loss, gradient
    difference and time, without an optimiser step; 0: never."""
    bf16: bool = False
    """Run the forward under bfloat16 autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Seed of sampling, data order and everything else random."""

    def __post_init__(self) -> None:
        hints = get_type_hints(Config)
        names = ("loss_type", "credit", "scale_rewards", "importance_sampling_level", "lr_scheduler_type")
        for name in (*names, "kl_estimator", "importance_sampling_mode"):
            allowed = get_args(hints[name])
            _require(self, name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("max_steps", "max_completion_length", "gradient_accumulation_steps", "num_iterations"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "beta"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("warmup_steps", "top_k", "compare_every"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require(self, "num_generations", self.num_generations >= 2, "at least 2: advantages compare within a group")
        _require(self, "temperature", self.temperature > 0, "above 0")
        _require(self, "top_p", 0 < self.top_p <= 1, "in (0, 1]")
        size = self.per_device_train_batch_size
        _require(
            self,
            "per_device_train_batch_size",
            size >= 1 and size % self.num_generations == 0,
            f"a positive multiple of num_generations={self.num_generations}: it counts completions, and groups stay "
            "whole",
        )
        _require(
            self,
            "steps_per_generation",
            self.steps_per_generation is None
            or (self.steps_per_generation >= 1 and self.steps_per_generation % self.gradient_accumulation_steps == 0),
            f"a positive multiple of gradient_accumulation_steps={self.gradient_accumulation_steps}",
        )
        _require(self, "epsilon", 0 < self.epsilon < 1, "in (0, 1)")
        if self.loss_type == "cispo":
            _require(
                self,
                "epsilon_high",
                self.epsilon_high is not None and self.epsilon_high >= 1,
                "the ceiling of the weight, at least 1, for loss_type=cispo (ScaleRL: 5.0)",
            )
            _require(self, "delta", self.delta is None, "None for loss_type=cispo, which does not use it")
        else:
            _require(self, "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "above 0, or None")
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            _require(
                self,
                "delta",
                self.delta is None or self.delta > 1 + high,
                f"above 1 + epsilon_high = {1 + high}, or None",
            )
        _require(self, "max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None")
        _require(
            self,
            "scale_rewards",
            self.credit != "rloo" or self.scale_rewards != "batch",
            "none for credit=rloo, which does not divide (the default, group, is ignored)",
        )
        _require(
            self,
            "kl_estimator",
            self.kl_estimator != "k1" or self.use_bias_correction_kl,
            "k2 or k3 for use_bias_correction_kl=False: the gradient of k1 alone has expectation zero",
        )
        _require(
            self,
            "soft_punish_cache",
            0 <= self.soft_punish_cache <= self.max_completion_length,
            f"in [0, max_completion_length={self.max_completion_length}]",
        )
        _require(self, "max_generation_batches", self.max_generation_batches >= 2, "at least 2: one draws nothing anew")
        self._check_importance_sampling_bounds()

    def _check_importance_sampling_bounds(self) -> None:
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        _require(self, "importance_sampling_clip_max", high is None or high > 0, "above 0, or None")
        _require(self, "importance_sampling_clip_min", low is None or low >= 0, "at least 0, or None")
        _require(
            self,
            "importance_sampling_clip_min",
            low is None or high is None or low < high,
            f"below importance_sampling_clip_max={high}",
        )
        _require(
            self,
            "importance_sampling_mode",
            low is not None or high is not None or self.importance_sampling_mode.endswith("_mask"),
            "token_mask or sequence_mask without importance_sampling_clip_max and importance_sampling_clip_min",
        )

    @property
    def micro_batches_per_generation(self) -> int:
        """Micro-batches that are sampled at a time on one process."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.micro_batches_per_generation // self.gradient_accumulation_steps * self.num_iterations


@dataclass(frozen=True, kw_only=True)
class PrefixRFTConfig:
    """Options of Prefix-RFT (`stemma.rl.prefix_rft`)."""

    num_prefixed_generations: int = 1
    """Completions of a group that begin with a piece of the demonstration, >= 1 and below num_generations."""
    prefix_ratio_low_start: float = 0.95
    """Lower bound of the share of the demonstration that is forced, at the first step, in [0, prefix_ratio_high]."""
    prefix_ratio_low_end: float = 0.05
    """The same at the last step, in [0, prefix_ratio_high]; half a cosine lies between."""
    prefix_ratio_high: float = 0.95
    """Upper bound of that share, in [0, 1]; the last token of a demonstration is never forced."""
    entropy_quantile: float = 0.2
    """Share of the forced tokens that is trained on, those with the highest entropy, in [0, 1]."""
    entropy_scope: EntropyScope = "batch"
    """Rank entropies among all forced tokens sampled together, or among those of each row."""
    prefix_advantage: PrefixAdvantage = "group"
    """Advantage of rows with a prefix: relative to the whole group, or that of the released code (reference)."""

    def __post_init__(self) -> None:
        _require(self, "num_prefixed_generations", self.num_prefixed_generations >= 1, "at least 1")
        _require(self, "prefix_ratio_high", 0 <= self.prefix_ratio_high <= 1, "in [0, 1]")
        for name in ("prefix_ratio_low_start", "prefix_ratio_low_end"):
            valid = 0 <= getattr(self, name) <= self.prefix_ratio_high
            _require(self, name, valid, f"in [0, prefix_ratio_high={self.prefix_ratio_high}]")
        _require(self, "entropy_quantile", 0 <= self.entropy_quantile <= 1, "in [0, 1]")
        _require(self, "entropy_scope", self.entropy_scope in get_args(EntropyScope), "batch or row")
        _require(self, "prefix_advantage", self.prefix_advantage in get_args(PrefixAdvantage), "group or reference")


@dataclass(frozen=True, kw_only=True)
class PPPOConfig:
    """Options of PPPO, progressive prefix-token policy optimisation (`stemma.rl.pppo`)."""

    eta_start: float = 0.15
    """Share of each output, from its beginning, that is trained on at first, in (0, 1]."""
    eta_max: float = 0.35
    """The most it grows to, in [eta_start, 1]."""
    eta_step: float = 0.05
    """What it grows by when evaluation stalls, >= 0; 0 keeps it fixed."""
    eta_patience: int = 1
    """Evaluations in a row without a new best eval/reward before it grows, >= 1."""
    num_continuations: int = 8
    """Continuations of each retained beginning that judge it beside the output itself, >= 0."""
    normalizer: Normalizer = "all"
    """Tokens that the loss is divided by: all of the outputs (paper), or the retained ones (kept)."""

    def __post_init__(self) -> None:
        _require(self, "eta_start", 0 < self.eta_start <= 1, "in (0, 1]")
        _require(self, "eta_max", self.eta_start <= self.eta_max <= 1, f"in [eta_start={self.eta_start}, 1]")
        _require(self, "eta_step", self.eta_step >= 0, "at least 0")
        _require(self, "eta_patience", self.eta_patience >= 1, "at least 1")
        _require(self, "num_continuations", self.num_continuations >= 0, "at least 0")
        _require(self, "normalizer", self.normalizer in get_args(Normalizer), "all or kept")


@dataclass(frozen=True, kw_only=True)
class TempoConfig:
    """Options of tree credit; see `stemma.rl.tempo`."""

    tree_td_coef: float = 1.0
    """Weight of the temporal difference at the branches of a group's prefix tree, >= 0; 0: GRPO. TEMPO: 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.tree_td_coef < float("inf"):
            raise ValueError(f"tree_td_coef must be a finite number, at least 0; got {self.tree_td_coef!r}")


@dataclass(frozen=True, kw_only=True)
class PrefixRLConfig:
    """Options of PrefixRL, training on problems that begin with part of a solution (`stemma.rl.prefix_rl`)."""

    grpo_options: ClassVar[Mapping[str, Any]] = {"scale_rewards": "none"}
    """What the paper sets other than GRPO's defaults among the trainer's own options."""

    cuts_per_problem: int = 3
    """Prefixed problems made of each trace, >= 1."""
    prefix_ratio_min: float = 0.4
    """Shortest prefix as a fraction of the trace, in [0, prefix_ratio_max]."""
    prefix_ratio_max: float = 0.8
    """Longest prefix as a fraction of the trace, below 1: the end of an answer is never given away."""
    include_unprefixed: bool = True
    """Train on the plain problems too."""
    too_long: TooLong = "error"
    """Refuse prefixed problems that leave no room for a completion (error), or leave them out (skip)."""

    def __post_init__(self) -> None:
        _require(self, "cuts_per_problem", self.cuts_per_problem >= 1, "at least 1")
        _require(self, "prefix_ratio_max", 0 <= self.prefix_ratio_max < 1, "in [0, 1)")
        valid = 0 <= self.prefix_ratio_min <= self.prefix_ratio_max
        _require(self, "prefix_ratio_min", valid, f"in [0, prefix_ratio_max={self.prefix_ratio_max}]")
        _require(self, "too_long", self.too_long in get_args(TooLong), "error or skip")
