"""GRPO: reinforcement learning from groups of completions, each shared prompt encoded once.

For every prompt, ``G`` completions are sampled and rewarded; the advantage of completion ``i`` is
``A_i = (r_i - mean r) / (std r + 1e-4)`` within its group, and each token's loss is the clipped policy gradient
``-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta KL`` with ``rho = pi / pi_old``. The G completions
repeat one prompt, and often each other's beginnings: the forward and backward run over the prefix tree of the whole
micro-batch, in which every shared token appears once, with the same result.

Source: DeepSeekMath (2024, arXiv 2402.03300); variants Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071),
CISPO (2506.13585); Prefix Grouper (2506.05433) for encoding the prompt once.

What we changed: the denominators of every loss but bnpo are those of the whole optimiser batch over all processes, so
accumulation and process count do not change the loss; a group is never split between micro-batches or processes;
prompts are token ids and never travel through text. Option names and meanings follow TRL 1.16's `GRPOConfig`.

Not here: generation by a server, parameters sharded over processes.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stemma.errors import InvalidDataError
from stemma.models.adapter import enable
from stemma.models.scoring import Mode
from stemma.rl._config import Config
from stemma.rl._losses import group_relative, token_weights, weighted_rewards, zero_std_fraction
from stemma.rl._shared import (
    Credit,
    LossMask,
    PromptSource,
    Reward,
    Rollout,
    RolloutBatch,
    Row,
    Sampler,
    ShuffledRows,
    all_tokens,
    checked_advantages,
    end_token_ids,
    mean_of,
    score_completions,
)
from stemma.rl._update import Pass, Policy, comparison
from stemma.train.distributed import broadcast_parameters, sum_gradients, sum_over_processes
from stemma.train.optimizer import adamw, apply_gradients, schedule
from stemma.train.seeds import stream_seed

__all__ = ["Config", "RolloutBatch", "Sampler", "ShuffledRows", "Trainer"]


class Trainer:
    """Trains a causal language model on its own completions, one optimiser step per call of `step`.

    Args:
        model: any transformers causal language model that `stemma.enable` accepts, or a peft model around one.
        config: see `Config`.
        prompts: see `PromptSource`, for example `ShuffledRows`.
        reward_funcs: see `Reward`; their weighted sum is the reward.
        processing_class: the tokenizer; it decodes completions for the reward functions.
        reward_weights: one per reward function; all 1 when None.
        rollout: how completions are made; independent samples when None.
        credit: advantages; those of the formula above when None.
        loss_mask: completion tokens that are trained on; all when not given.
        ref_model: the reference of the KL term when beta > 0. None: the base model of a peft model, else a copy of
            `model` as it is now, so restore a checkpoint's weights after construction.
        accelerator: an `accelerate.Accelerator`; made when None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        prompts: PromptSource,
        reward_funcs: Reward | Sequence[Reward],
        processing_class: Any,
        reward_weights: Sequence[float] | None = None,
        rollout: Rollout | None = None,
        credit: Credit | None = None,
        loss_mask: LossMask = all_tokens,
        ref_model: nn.Module | None = None,
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.config, self.prompts, self.processing_class = config, prompts, processing_class
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        if not self.reward_funcs or len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one entry per reward function, got {len(self.reward_weights)} for "
                f"{len(self.reward_funcs)} functions"
            )
        self.rollout = rollout or Sampler(
            max_completion_length=config.max_completion_length,
            eos_token_id=end_token_ids(model, processing_class),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        self.credit = credit or self._group_relative
        self.loss_mask = loss_mask

        self.model = model.to(self.accelerator.device)
        broadcast_parameters(self.accelerator, self.model)
        self.ref_model = ref_model
        if config.beta and ref_model is None and not hasattr(model, "disable_adapter"):
            self.ref_model = copy.deepcopy(model)
        if self.ref_model is not None:
            self.ref_model = self.ref_model.to(self.accelerator.device).eval().requires_grad_(False)
        for each in (self.model, self.ref_model):
            if each is not None and (config.shared_prefix or config.compare_every):
                enable(each)
        self.policy = Policy(self.model, config, self.accelerator)
        if config.gradient_checkpointing:
            # transformers 5.23 renamed the method and will drop the old name in version 6.
            switch = getattr(self.model, "activation_checkpointing_enable", None)
            (switch or self.model.gradient_checkpointing_enable)()  # type: ignore[operator, misc]
        self.optimizer = adamw(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
        )
        self.scheduler = schedule(
            self.optimizer, config.lr_scheduler_type, warmup_steps=config.warmup_steps, total_steps=config.max_steps
        )
        self.total_steps, self.completed_steps, self.generations = config.max_steps, 0, 0
        self._batch: RolloutBatch | None = None

    # ------------------------------------------------------------------ one step

    def step(self) -> dict[str, float]:
        """Sample when the last batch is used up, then take one optimiser step; returns what to log."""
        config, started = self.config, time.perf_counter()
        metrics: dict[str, float] = {}
        cycle = self.completed_steps % config.steps_per_rollout
        if cycle == 0:
            metrics |= self._generate()
        assert self._batch is not None
        micro_batches, entropy_weight = self._optimiser_batch(self._batch, cycle)
        self.model.train()

        modes: list[Mode] = ["auto", "plain"] if config.shared_prefix else ["plain", "shared"]
        compared = bool(config.compare_every) and (self.completed_steps + 1) % config.compare_every == 0
        passes = {}
        # Whichever forward runs second finds warm caches, so the order of a comparison alternates.
        backwards = compared and self.completed_steps // config.compare_every % 2
        for mode in modes[:1] if not compared else modes[:: -1 if backwards else 1]:
            passes[mode] = Pass(self.policy, micro_batches, mode, entropy_weight)
        chosen = passes[modes[0]]
        if compared:
            shared, plain = (passes[mode] for mode in (modes if config.shared_prefix else modes[::-1]))
            metrics |= comparison(shared, plain)
        chosen.restore_gradients()

        update_started = time.perf_counter()
        sum_gradients(self.accelerator, self.model.parameters())
        rate = self.scheduler.get_last_lr()[0]
        norm = apply_gradients(
            self.optimizer,
            self.scheduler,
            max_grad_norm=config.max_grad_norm,
            what=f"step {self.completed_steps + 1}",
        )
        update_seconds = chosen.seconds + time.perf_counter() - update_started
        metrics |= self.policy.statistics(micro_batches, chosen)
        self.completed_steps += 1
        metrics |= {"grad_norm": norm, "learning_rate": rate}
        metrics |= {"time/update": update_seconds, "time/step": time.perf_counter() - started}
        return metrics

    def _generate(self) -> dict[str, float]:
        """Fill the buffer with rollouts, their rewards, advantages, masks and constant log-probabilities."""
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        started = time.perf_counter()
        count = config.per_device_train_batch_size // config.num_generations * config.micro_batches_per_generation
        rows = list(self.prompts(self.generations, count * world))
        if len(rows) != count * world:
            raise InvalidDataError(f"the prompt source returned {len(rows)} rows, expected {count * world}")
        rows = rows[rank * count : (rank + 1) * count]
        seed = stream_seed(config.seed, "rollout", self.generations, rank)
        batch = self.rollout(self.model, rows, config.num_generations, seed)
        sampled = time.perf_counter()
        per_function = self._reward(rows, batch)
        rewarded = time.perf_counter()

        batch.advantages = checked_advantages(self.credit(batch), len(batch))
        batch = batch.to(self.accelerator.device)
        forwarded = 0
        needs_entropies = getattr(self.loss_mask, "needs_entropies", False)
        if needs_entropies or config.steps_per_rollout > 1:
            batch.old_logprobs, batch.entropies, tokens = self.policy.score(batch, entropy=needs_entropies)
            forwarded += tokens
        if config.beta:
            with self._reference() as reference:
                batch.ref_logprobs, _, tokens = self.policy.score(batch, model=reference)
            forwarded += tokens
        mask = self.loss_mask(batch, self.completed_steps) & batch.completion_mask
        batch.loss_mask = mask & ~batch.truncated[:, None] if config.mask_truncated_completions else mask
        self._batch, self.generations = batch, self.generations + 1

        lengths = batch.completion_mask.sum(-1)
        metrics = self._reward_metrics(batch, per_function)
        counts = [lengths.sum(), batch.truncated.sum(), batch.sampled_mask.sum()]
        totals = sum_over_processes(self.accelerator, [len(batch), *(count.item() for count in counts), forwarded])
        return metrics | {
            "completions/mean_length": totals[1] / totals[0],
            "completions/clipped_ratio": totals[2] / totals[0],
            "tokens/sampled": totals[3],
            "tokens/forwarded_before_update": totals[4],
            "time/rollout": sampled - started,
            "time/reward": rewarded - sampled,
            "time/score": time.perf_counter() - rewarded,
        }

    def _reward(self, rows: Sequence[Row], batch: RolloutBatch) -> list[list[float | None]]:
        """Set `batch.reward`; return the values per function."""
        decode: Callable[[list[int]], str] = partial(self.processing_class.decode, skip_special_tokens=True)
        values = score_completions(self.reward_funcs, rows, batch, decode)
        batch.reward = torch.tensor(weighted_rewards(values, self.reward_weights), dtype=torch.float64)
        return values

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
        for index, function in enumerate(self.reward_funcs if len(self.reward_funcs) > 1 else []):
            name = getattr(function, "__name__", type(function).__name__)
            metrics[f"rewards/{name}/mean"] = functions[2 * index] / max(functions[2 * index + 1], 1)
        return metrics

    def _group_relative(self, batch: RolloutBatch) -> Tensor:
        assert batch.reward is not None
        everyone = None
        if self.config.scale_rewards == "batch" and self.accelerator.num_processes > 1:
            everyone = self.accelerator.gather(batch.reward.to(self.accelerator.device)).cpu()
        return group_relative(
            batch.reward, batch.group_id, scale_rewards=self.config.scale_rewards, all_rewards=everyone
        ).float()

    def _optimiser_batch(self, batch: RolloutBatch, cycle: int) -> tuple[list[RolloutBatch], float]:
        """The micro-batches of this step with the weight of every token, and the weight of a token's entropy."""
        config = self.config
        accumulation = config.gradient_accumulation_steps
        groups = config.per_device_train_batch_size // config.num_generations
        first = cycle % (config.micro_batches_per_generation // accumulation) * accumulation
        micro = [batch.groups(i * groups, (i + 1) * groups) for i in range(first, first + accumulation)]
        tokens = [float(b.loss_mask.sum()) for b in micro if b.loss_mask is not None]
        sequences, total = sum_over_processes(self.accelerator, [sum(map(len, micro)), sum(tokens)])
        for each, own in zip(micro, tokens, strict=True):
            assert each.loss_mask is not None
            local = own * accumulation * self.accelerator.num_processes
            each.weights = token_weights(
                each.loss_mask,
                config.loss_type,
                num_sequences=int(sequences),
                num_tokens=int(local if config.loss_type == "bnpo" else total),
                max_completion_length=config.max_completion_length,
            )
        return micro, config.entropy_coef / max(total, 1.0)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model: a model of its own, or the policy with its adapter switched off."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model

    def evaluate(self, rows: Sequence[Row], *, num_generations: int | None = None) -> dict[str, float]:
        """Sample and score held-out prompts; nothing is trained and no global random state is touched.

        Args:
            rows: the prompts, the same on every process; processes share the work.
            num_generations: completions per prompt; the config's when None.

        Returns:
            `eval/reward` (mean reward: pass@1 for 0/1 rewards) and `eval/reward_best` (mean over prompts of the best
            reward: pass@k), over the prompts with a scorable completion.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = rows[rank::world]
        sums = [0.0, 0.0, 0.0]
        if own:
            seed = stream_seed(self.config.seed, "evaluate", rank)
            batch = self.rollout(self.model, own, num_generations or self.config.num_generations, seed)
            self._reward(own, batch)
            assert batch.reward is not None
            for group in range(len(own)):
                reward = batch.reward[batch.group_id == group]
                known = reward[~reward.isnan()]
                if len(known):
                    sums = [sums[0] + 1, sums[1] + mean_of(known.tolist()), sums[2] + known.max().item()]
        count, mean, best = sum_over_processes(self.accelerator, sums)
        return {"eval/reward": mean / max(count, 1), "eval/reward_best": best / max(count, 1)}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's parameters that the next step depends on. All processes call it together."""
        return {
            "completed_steps": self.completed_steps,
            "generations": self.generations,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self._gather_batches(),
        }

    def _gather_batches(self) -> list[dict[str, Any] | None]:
        """The buffered rollouts of every process, in the order of processes."""
        own = None if self._batch is None else self._batch.to("cpu").state_dict()
        if self.accelerator.num_processes == 1:
            return [own]
        from accelerate.utils import gather_object

        return gather_object([own])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InvalidDataError: the state holds rollouts that are still to be trained on, of another number of processes.
        """
        self.completed_steps, self.generations = state["completed_steps"], state["generations"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        batches = state["batches"]
        if self.completed_steps % self.config.steps_per_rollout == 0:
            self._batch = None  # the next step samples anew
        elif len(batches) == self.accelerator.num_processes:
            self._batch = RolloutBatch(**batches[self.accelerator.process_index]).to(self.accelerator.device)
        else:
            raise InvalidDataError(
                f"the checkpoint holds rollouts of {len(batches)} processes, this run has "
                f"{self.accelerator.num_processes}; resume with as many processes as before"
            )
