"""From prompts to a batch that is ready for training: samples, rewards, advantages, masks, old log-probabilities."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from stemma.errors import InvalidDataError
from stemma.rl.engine.advantages import zero_std_fraction
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.dynamic_sampling import Pool, concatenate, different_rewards
from stemma.rl.engine.hooks import (
    Credit,
    Generate,
    LossMask,
    PromptSource,
    Reward,
    Rollout,
    Row,
    checked_advantages,
    independent_samples,
    mean_of,
)
from stemma.rl.engine.losses import soft_overlong_punishment, weighted_rewards
from stemma.rl.engine.options import Config
from stemma.rl.engine.rewards import score_completions
from stemma.rl.engine.update import Policy
from stemma.train.distributed import sum_over_processes
from stemma.train.seeds import stream_seed
from stemma.train.sharding import whole_parameters

__all__ = ["RolloutCollector"]


class RolloutCollector:
    """Samples with the policy and prepares what its update needs. The four hooks of the trainer meet here.

    Args:
        config: the trainer's options.
        generate: sampling, bound to the policy.
        policy: scores batches for constant log-probabilities and entropies.
        reference: context manager that gives the reference model of the KL term.
        reward_funcs, reward_weights: the reward is the weighted sum of the functions' values.
        decode: token ids to text.
        prompts, rollout, credit, loss_mask: the hooks.
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(
        self,
        config: Config,
        *,
        generate: Generate,
        policy: Policy,
        reference: Callable[[], AbstractContextManager[nn.Module]],
        reward_funcs: Sequence[Reward],
        reward_weights: Sequence[float],
        decode: Callable[[list[int]], str],
        prompts: PromptSource,
        rollout: Rollout,
        credit: Credit,
        loss_mask: LossMask,
        accelerator: Any,
    ) -> None:
        self.config, self.generate, self.policy, self.reference = config, generate, policy, reference
        self.reward_funcs, self.reward_weights, self.decode = reward_funcs, reward_weights, decode
        self.prompts, self.rollout, self.credit, self.loss_mask = prompts, rollout, credit, loss_mask
        self.accelerator = accelerator
        self.generations = 0

    def hooks(self) -> Iterator[tuple[str, Any]]:
        """Names and objects of the four hooks."""
        for name in ("prompts", "rollout", "credit", "loss_mask"):
            yield name, getattr(self, name)

    def next_batch(self, step: int) -> tuple[RolloutBatch, dict[str, float]]:
        """The rollouts of the next generation, ready to be trained on, and what to log about them.

        Args:
            step: optimiser steps so far.
        """
        dynamic, clock = self.config.dynamic_sampling, {"time/rollout": 0.0, "time/reward": 0.0}
        pool = Pool(self._count * self.accelerator.num_processes, self.accelerator)
        rounds: list[RolloutBatch] = []
        values: list[list[float | None]] = [[] for _ in self.reward_funcs]
        while not rounds or (dynamic and not pool.full and len(rounds) < self.config.max_generation_batches):
            batch, different, found = self._round(step, clock)
            rounds.append(batch)
            values = [before + new for before, new in zip(values, found, strict=True)]
            if dynamic:
                pool.add(batch, different)
        batch, metrics = pool.take() if dynamic else (rounds[0], {})
        sampled = concatenate(rounds)
        metrics |= self._reward_metrics(sampled, values) | self._token_metrics(sampled) | self._hook_metrics(batch)

        started = time.perf_counter()
        batch.advantages = checked_advantages(self.credit(batch), len(batch))
        batch.extras = {name: value for name, value in batch.extras.items() if isinstance(value, Tensor)}
        batch = batch.to(self.accelerator.device)
        forwarded = self._score_and_mask(batch, step)
        (total,) = sum_over_processes(self.accelerator, [forwarded])
        metrics |= {"tokens/forwarded_before_update": total}
        return batch, metrics | clock | {"time/score": time.perf_counter() - started}

    def _round(self, step: int, clock: dict[str, float]) -> tuple[RolloutBatch, Tensor, list[list[float | None]]]:
        """Completions of the next prompts with rewards; per prompt, whether these differ; values per function."""
        started = time.perf_counter()
        rows, seeds = self._rows()
        with whole_parameters(self.accelerator, self.policy.model):
            batch = self.rollout(self.generate, rows, self.config.num_generations, seeds, step)
        sampled = time.perf_counter()
        values = self.reward(rows, batch)
        different = different_rewards(batch)
        for part in (batch, *batch.further):
            if self.config.soft_punish_cache:
                assert part.reward is not None
                part.reward = part.reward + self._overlong(part)
        self.generations += 1
        clock["time/rollout"] += sampled - started
        clock["time/reward"] += time.perf_counter() - sampled
        return batch, different, values

    @property
    def _count(self) -> int:
        """Prompts of a round on one process."""
        groups = self.config.per_device_train_batch_size // self.config.num_generations
        return groups * self.config.micro_batches_per_generation

    def _overlong(self, batch: RolloutBatch) -> Tensor:
        lengths = batch.completion_mask.sum(-1)
        return soft_overlong_punishment(lengths, self.config.max_completion_length, self.config.soft_punish_cache)

    def _rows(self) -> tuple[list[Row], list[int]]:
        """This process's share of the generation's prompts, with a seed for each."""
        rank, world, count = self.accelerator.process_index, self.accelerator.num_processes, self._count
        rows = list(self.prompts(self.generations, count * world))
        if len(rows) != count * world:
            raise InvalidDataError(f"the prompt source returned {len(rows)} rows, expected {count * world}")
        own = range(rank * count, (rank + 1) * count)
        seeds = [stream_seed(self.config.seed, "rollout", self.generations, index) for index in own]
        return [rows[index] for index in own], seeds

    def _score_and_mask(self, batch: RolloutBatch, step: int) -> int:
        """Fill in masks and constant log-probabilities; returns the tokens that went through a model for them."""
        config, forwarded = self.config, 0
        needs_entropies = getattr(self.loss_mask, "needs_entropies", False)
        if not needs_entropies:  # what is masked out need not be scored
            self._mask(batch, step)
        if needs_entropies or config.steps_per_rollout > 1:
            batch.old_logprobs, batch.entropies, tokens = self.policy.score(batch, entropy=needs_entropies)
            forwarded += tokens
        if needs_entropies:
            self._mask(batch, step)
        if config.beta:
            with self.reference() as reference:
                batch.ref_logprobs, _, tokens = self.policy.score(batch, model=reference)
            forwarded += tokens
        return forwarded

    def _mask(self, batch: RolloutBatch, step: int) -> None:
        allowed = batch.completion_mask
        if self.config.mask_truncated_completions:
            allowed = allowed & ~batch.truncated[:, None]
        batch.loss_mask = self.loss_mask(batch, step) & allowed
        normaliser = getattr(self.loss_mask, "normaliser", None)
        if normaliser is not None:
            batch.norm_mask = normaliser(batch) & allowed

    def reward(self, rows: Sequence[Row], batch: RolloutBatch) -> list[list[float | None]]:
        """Set `batch.reward`, and that of its further completions; return the values per function."""
        values: list[list[float | None]] = [[] for _ in self.reward_funcs]
        if len(batch):
            values = score_completions(self.reward_funcs, rows, batch, self.decode)
        batch.reward = torch.tensor(weighted_rewards(values, self.reward_weights), dtype=torch.float64)
        for further in batch.further:
            self.reward([rows[group] for group in batch.group_id.tolist()], further)
        return values

    def evaluate(self, rows: Sequence[Row], num_generations: int) -> dict[str, float]:
        """Sample and score prompts without training on them; see `Trainer.evaluate`."""
        prefixed = next((index for index, row in enumerate(rows) if row.get("prefix_ids")), None)
        if prefixed is not None:
            raise InvalidDataError(
                f"evaluation row {prefixed} has prefix_ids: a policy is evaluated on problems without a prefix; build "
                "the evaluation rows from the problems themselves"
            )
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        own = [rows[index] for index in mine]
        sums = [0.0, 0.0, 0.0]
        seeds = [stream_seed(self.config.seed, "evaluate", index) for index in mine]
        with whole_parameters(self.accelerator, self.policy.model):
            batch = independent_samples(self.generate, own, num_generations, seeds, 0) if own else None
        if batch is not None:
            self.reward(own, batch)
            assert batch.reward is not None
            for group in range(len(own)):
                reward = batch.reward[batch.group_id == group]
                known = reward[~reward.isnan()]
                if len(known):
                    sums = [sums[0] + 1, sums[1] + mean_of(known.tolist()), sums[2] + known.max().item()]
        count, mean, best = sum_over_processes(self.accelerator, sums)
        means = [total / count if count else math.nan for total in (mean, best)]
        metrics = dict(zip(("eval/reward", "eval/reward_best"), means, strict=True))
        for _, hook in self.hooks():
            if hasattr(hook, "on_evaluate"):
                hook.on_evaluate(metrics)
        return metrics

    # ------------------------------------------------------------------ what to log

    def _token_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        lengths = batch.completion_mask.sum(-1)
        sums: list[float] = [len(batch), lengths.sum().item(), batch.truncated.sum().item(), 0.0, 0.0, 0.0]
        for part in (batch, *batch.further):
            prompts = torch.tensor([len(ids) for ids in part.prompt_ids])[part.group_id.cpu()]
            sums[3] += part.sampled_mask.sum().item()
            sums[4] += part.encoded_tokens
            sums[5] += (prompts + part.completion_mask.sum(-1).cpu() - 1).sum().item()
        rows, tokens, truncated, sampled, encoded, repeated = sum_over_processes(self.accelerator, sums)
        metrics = {
            "completions/mean_length": tokens / rows,
            "completions/clipped_ratio": truncated / rows,
            "tokens/sampled": sampled,
        }
        if encoded:
            metrics |= {"tokens/rollout_encoded": encoded, "tokens/rollout_without_sharing": repeated}
        return metrics

    def _hook_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        own = [hook.metrics(batch) for _, hook in self.hooks() if hasattr(hook, "metrics")]
        found = {name: value for metrics in own for name, value in metrics.items()}
        means = [
            total / self.accelerator.num_processes for total in sum_over_processes(self.accelerator, [*found.values()])
        ]
        return dict(zip(found, means, strict=True))

    def _reward_metrics(self, batch: RolloutBatch, per_function: list[list[float | None]]) -> dict[str, float]:
        assert batch.reward is not None
        scored = batch.reward[~batch.reward.isnan()]
        sums = [len(scored), scored.sum().item(), (scored**2).sum().item()]
        sums += [zero_std_fraction(batch.reward, batch.group_id).item() * len(batch.prompt_ids), len(batch.prompt_ids)]
        for values in per_function:
            known = [value for value in values if value is not None]
            sums += [sum(known), len(known)]
        count, total, squares, equal, groups, *functions = sum_over_processes(self.accelerator, sums)
        variance = (squares - total**2 / max(count, 1)) / max(count - 1, 1)
        metrics = {
            "reward": total / count if count else float("nan"),
            "reward_std": max(variance, 0.0) ** 0.5,
            "frac_reward_zero_std": equal / groups,
        }
        if self.config.soft_punish_cache:
            punished = sum_over_processes(self.accelerator, [self._overlong(batch).sum().item(), len(batch)])
            metrics["rewards/soft_overlong_punishment/mean"] = punished[0] / punished[1]
        for index, function in enumerate(self.reward_funcs if len(self.reward_funcs) > 1 else []):
            name = getattr(function, "__name__", type(function).__name__)
            sum_known, known_count = functions[2 * index : 2 * index + 2]
            metrics[f"rewards/{name}/mean"] = sum_known / known_count if known_count else float("nan")
        return metrics
