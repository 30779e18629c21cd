"""One policy update over prefix trees: the loss of a micro-batch, its gradients, what to log, shared against plain."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError
from stemma.prefix.tree import PrefixTree
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.losses import TokenLoss, importance_weights, token_loss
from stemma.rl.engine.options import Config
from stemma.scoring.plan import Mode
from stemma.scoring.score import backward, score
from stemma.scoring.scores import Scores
from stemma.train.distributed import max_over_processes, sum_over_processes
from stemma.train.sharding import full_tensor

__all__ = ["GradientPass", "Policy", "comparison", "router_aux_loss_coef"]

COMPARED_TOKENS = 4096
"""Most tokens, padding too, that a comparison sends through the plain forward (two rows at least), so that its cost
does not grow with the batch."""


def router_aux_loss_coef(model: nn.Module, config: Config) -> float:
    """The weight of a mixture-of-experts model's balancing loss, 0 for a model without a router.

    Raises:
        ValueError: the config gives a weight, and the model has no router.
    """
    text_config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if hasattr(text_config, "output_router_logits"):
        given = config.router_aux_loss_coef
        return getattr(text_config, "router_aux_loss_coef", 0.0) if given is None else given
    if config.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef must be None or 0 for {type(model).__name__}, which has no router; got "
            f"{config.router_aux_loss_coef}"
        )
    return 0.0


class Policy:
    """Scores rollouts with a model and differentiates the loss of `config`."""

    def __init__(self, model: nn.Module, config: Config, accelerator: Any) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        self.router_aux_loss_coef = router_aux_loss_coef(model, config)

    @torch.no_grad()
    def score(
        self, batch: RolloutBatch, *, model: nn.Module | None = None, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, int]:
        """Log-probabilities of a whole generation, in micro-batches, without gradient.

        Args:
            model: the policy when None.
            entropy: compute entropies too.

        Returns:
            (N, T) float32 log-probabilities, (N, T) float32 entropies or None, tokens that went through the model.
        """
        model = self.model if model is None else model
        groups = self.config.per_device_train_batch_size // self.config.num_generations
        logprobs = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
        entropies, forwarded, row = torch.zeros_like(logprobs) if entropy else None, 0, 0
        model.eval()
        for first in range(0, len(batch.prompt_ids), groups):
            part = batch.groups(first, first + groups)
            with self.autocast():
                scores = score(
                    model,
                    self._tree(part),
                    temperature=self.config.temperature,
                    entropy=entropy,
                    max_tokens=self.config.max_tokens,
                    mode="auto" if self.config.shared_prefix else "plain",
                )
            logprobs[row + scores.sequence, scores.column] = scores.logprobs.to(logprobs.dtype)
            if entropies is not None and scores.entropies is not None:
                entropies[row + scores.sequence, scores.column] = scores.entropies.to(logprobs.dtype)
            forwarded += scores.forwarded_tokens
            row += len(part)
        return logprobs, entropies, forwarded

    def _tree(self, batch: RolloutBatch) -> PrefixTree:
        """What has to be encoded: rows up to their last token with gradient; all of them for a router's balance."""
        return batch.tree(trained_only=not self.router_aux_loss_coef)

    def backward(self, batch: RolloutBatch, mode: Mode, entropy_weight: float) -> tuple[float, Scores, int]:
        """Add the gradients of one micro-batch.

        Args:
            batch: with advantages, loss mask and weights.
            mode: as in `stemma.backward`.
            entropy_weight: subtracted from the loss per nat of a token's entropy.

        Returns:
            The micro-batch's share of the loss, its scores, and the tokens of its rows without sharing.
        """
        tree = self._tree(batch)
        with self.autocast():
            loss, scores = backward(
                self.model,
                tree,
                partial(self._loss, batch, entropy_weight),
                temperature=self.config.temperature,
                entropy=True,
                aux_loss=bool(self.router_aux_loss_coef),
                max_tokens=self.config.max_tokens,
                mode=mode,
            )
        return float(loss), scores, tree.total_tokens

    def _loss(self, batch: RolloutBatch, entropy_weight: float, scores: Scores) -> Tensor:
        """The loss of the sequences that `scores` holds: a sum, so that the parts of a batch add up to the whole."""
        rows, row = torch.unique(scores.sequence, return_inverse=True)
        assert batch.loss_mask is not None
        assert batch.weights is not None
        mask = batch.loss_mask[rows]
        token = self._token_loss(batch, rows, _padded(scores.logprobs, row, scores.column, mask))
        loss = (token.loss * batch.weights[rows].to(token.loss.dtype)).sum()
        if entropy_weight and scores.entropies is not None:
            loss = loss - entropy_weight * _padded(scores.entropies, row, scores.column, mask)[mask].sum()
        if scores.aux_loss is not None:
            share = self.config.gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / share
        return loss

    def _token_loss(self, batch: RolloutBatch, rows: Tensor, logprobs: Tensor) -> TokenLoss:
        assert batch.advantages is not None
        assert batch.loss_mask is not None
        config = self.config
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[rows]
        return token_loss(
            logprobs,
            old_logprobs,
            batch.advantages[rows],
            batch.loss_mask[rows],
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            importance_sampling_level=config.importance_sampling_level,
            ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows],
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            use_bias_correction_kl=config.use_bias_correction_kl,
            sampling_weights=self._sampling_weights(batch, rows, old_logprobs),
        )

    def _sampling_weights(self, batch: RolloutBatch, rows: Tensor, old_logprobs: Tensor) -> Tensor | None:
        """Weights against the sampler, from the sampled tokens that are trained on; None without correction."""
        config = self.config
        if not config.importance_sampling_correction:
            return None
        assert batch.loss_mask is not None
        if batch.sampling_logprobs is None:
            raise InvalidBatchError(
                "importance_sampling_correction needs RolloutBatch.sampling_logprobs, which the rollout left out; "
                "return the sampler's log-probabilities, or switch the correction off"
            )
        return importance_weights(
            old_logprobs,
            batch.sampling_logprobs[rows],
            (batch.loss_mask & batch.sampled_mask)[rows],
            mode=config.importance_sampling_mode,
            clip_max=config.importance_sampling_clip_max,
            clip_min=config.importance_sampling_clip_min,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """What the policy's forwards run under, those that sample too."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    @torch.no_grad()
    def statistics(self, micro_batches: Sequence[RolloutBatch], done: "GradientPass") -> dict[str, float]:
        """What to log about an update, over all processes."""
        names = ("loss", "tokens", "entropy", "kl", "low", "high", "ratios", "gap", "gaps", "forwarded", "repeated")
        sums = dict.fromkeys(names, 0.0)
        sums |= {"loss": done.loss, "forwarded": done.forwarded_tokens, "repeated": done.tokens_without_sharing}
        sums |= {"weight": 0.0, "weights": 0.0}
        widest, lightest, heaviest = 0.0, float("inf"), 0.0
        for batch, scores in zip(micro_batches, done.scores, strict=True):
            assert batch.loss_mask is not None
            assert scores.entropies is not None
            mask = batch.loss_mask
            logprobs = _padded(scores.logprobs, scores.sequence, scores.column, mask)
            token = self._token_loss(batch, torch.arange(len(batch), device=mask.device), logprobs)
            # A ratio per sequence counts once for each sequence that has a token in the loss.
            counted = mask.any(-1, keepdim=True) if token.clipped_low.shape[1] == 1 else mask
            sums["tokens"] += mask.sum().item()
            sums["ratios"] += counted.sum().item()
            sums["entropy"] += _padded(scores.entropies, scores.sequence, scores.column, mask)[mask].sum().item()
            sums["low"] += (token.clipped_low & counted).sum().item()
            sums["high"] += (token.clipped_high & counted).sum().item()
            sums["kl"] += 0.0 if token.kl is None else token.kl[mask].sum().item()
            if batch.sampling_logprobs is not None:
                own = logprobs if batch.old_logprobs is None else batch.old_logprobs
                gap = (own - batch.sampling_logprobs).abs()[batch.sampled_mask & mask]
                gap = gap[~gap.isnan()]  # the sampler did not say
                sums["gap"], sums["gaps"] = sums["gap"] + gap.sum().item(), sums["gaps"] + gap.numel()
                widest = max(widest, gap.max().item() if gap.numel() else 0.0)
                weights = self._sampling_weights(batch, torch.arange(len(batch), device=mask.device), own)
                if weights is not None and gap.numel():
                    sampled = batch.sampled_mask & mask
                    used = weights[sampled.any(-1, keepdim=True) if weights.shape[1] == 1 else sampled]
                    sums["weight"], sums["weights"] = sums["weight"] + used.sum().item(), sums["weights"] + used.numel()
                    lightest, heaviest = min(lightest, used.min().item()), max(heaviest, used.max().item())
        sums = dict(zip(sums, sum_over_processes(self.accelerator, list(sums.values())), strict=True))
        tokens, ratios = max(sums["tokens"], 1), max(sums["ratios"], 1)
        metrics = {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / tokens,
            "clip_ratio/low_mean": sums["low"] / ratios,
            "clip_ratio/high_mean": sums["high"] / ratios,
            "clip_ratio/region_mean": (sums["low"] + sums["high"]) / ratios,
            "tokens/optimised": sums["tokens"],
            "tokens/forwarded": sums["forwarded"],
            "tokens/without_sharing": sums["repeated"],
        }
        if self.config.beta:
            metrics["kl"] = sums["kl"] / tokens
        if sums["gaps"]:
            metrics["sampling/sampling_logp_difference/mean"] = sums["gap"] / sums["gaps"]
            metrics["sampling/sampling_logp_difference/max"] = max_over_processes(self.accelerator, widest)
        if sums["weights"]:
            name = "sampling/importance_sampling_ratio"
            metrics[f"{name}/mean"] = sums["weight"] / sums["weights"]
            metrics[f"{name}/min"] = -max_over_processes(self.accelerator, -lightest)
            metrics[f"{name}/max"] = max_over_processes(self.accelerator, heaviest)
        return metrics


class GradientPass:
    """One forward and backward over the micro-batches of a step, which adds to the gradients of the parameters."""

    def __init__(
        self, policy: Policy, micro_batches: Sequence[RolloutBatch], mode: Mode, entropy_weight: float
    ) -> None:
        device = policy.accelerator.device
        _synchronise(device)
        started = time.perf_counter()
        results = [policy.backward(batch, mode, entropy_weight) for batch in micro_batches]
        _synchronise(device)
        self.seconds = time.perf_counter() - started
        self.loss = sum(loss for loss, _, _ in results)
        self.scores = [scores for _, scores, _ in results]
        self.forwarded_tokens = sum(scores.forwarded_tokens for scores in self.scores)
        self.tokens_without_sharing = sum(tokens for _, _, tokens in results)


def comparison(policy: Policy, batch: RolloutBatch, entropy_weight: float, *, plain_first: bool) -> dict[str, float]:
    """The first rows of a batch through both forwards, of this process; no gradient is left behind.

    Returns:
        Losses, largest difference of a log-probability, largest difference of a gradient relative to the largest
        gradient, seconds.
    """
    prompts = torch.tensor([len(ids) for ids in batch.prompt_ids])[batch.group_id.cpu()]
    longest = (prompts + batch.completion_mask.sum(-1).cpu()).cummax(0).values
    padded = longest * torch.arange(1, len(batch) + 1)
    part = batch.first_rows(max(2, int((padded <= COMPARED_TOKENS).sum())))
    modes: list[Mode] = ["auto" if policy.config.shared_prefix else "shared", "plain"]
    passes, gradients = {}, {}
    for mode in modes[:: -1 if plain_first else 1]:
        passes[mode] = GradientPass(policy, [part], mode, entropy_weight)
        gradients[mode] = [p.grad for p in policy.model.parameters() if p.requires_grad]
        policy.model.zero_grad(set_to_none=True)
    shared, plain = (passes[mode] for mode in modes)
    difference = largest = 0.0
    for pair in zip(*(gradients[mode] for mode in modes), strict=True):
        present = [full_tensor(gradient) for gradient in pair if gradient is not None]
        if present:
            one, two = present if len(present) == 2 else (present[0], torch.zeros_like(present[0]))
            difference = max(difference, (one - two).abs().max().item())
            largest = max(largest, one.abs().max().item(), two.abs().max().item())
    errors = (shared.scores[0].logprobs - plain.scores[0].logprobs).abs()
    return {
        "compare/loss_shared": shared.loss,
        "compare/loss_plain": plain.loss,
        "compare/logprob_error": errors.max().item() if errors.numel() else 0.0,
        "compare/gradient_error": difference / largest if largest else 0.0,
        "compare/time_shared": shared.seconds,
        "compare/time_plain": plain.seconds,
        "compare/time_ratio": plain.seconds / shared.seconds,
    }


def _padded(values: Tensor, row: Tensor, column: Tensor, like: Tensor) -> Tensor:
    """Flat values (S,) at their rows and columns of a zero tensor of the shape of `like`, differentiable."""
    return values.new_zeros(like.shape).index_put((row, column), values)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
