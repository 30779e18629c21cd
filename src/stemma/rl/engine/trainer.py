"""The trainer of this room: one optimiser step of GRPO at a time, with the hooks by which a method changes it."""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from stemma.decode.rollout import Generator, LocalGenerator
from stemma.errors import InvalidDataError
from stemma.models.adapter import base_model
from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import (
    Credit,
    LossMask,
    PromptSource,
    Reward,
    Rollout,
    Row,
    all_tokens,
    end_token_ids,
    independent_samples,
    sample,
)
from stemma.rl.engine.losses import token_weights
from stemma.rl.engine.options import Config
from stemma.rl.engine.rollouts import RolloutCollector
from stemma.rl.engine.update import GradientPass, Policy, comparison, router_aux_loss_coef
from stemma.scoring.enable import enable
from stemma.scoring.plan import Mode
from stemma.train.distributed import broadcast_parameters, sum_gradients, sum_over_processes
from stemma.train.optimizer import adamw, apply_gradients, schedule
from stemma.train.sharding import (
    check_sharding,
    fsdp_plugin,
    full_optimizer_state_dict,
    is_sharded,
    load_full_optimizer_state_dict,
    shard,
)

__all__ = ["Trainer", "check"]

SAMPLING_GAP = 0.1
"""Nats a token, in the mean, from which the sampler is another policy. Rounding gives 1e-5 in float32 and 0.02 to 0.05
in bfloat16 (a pretrained Llama of 135M parameters, before and during training); 0.1 is half the clip range."""


def check(model: nn.Module, config: Config, *, generator: Generator | None = None, accelerator: Any) -> None:
    """Refuse what a `Trainer` of these parts cannot do, for callers with work to do before they make one.

    The model is enabled for shared prefixes where the config has them.

    Raises:
        UnsupportedModelError: the model cannot run over prefix trees.
        ValueError: options that do not go with the model, the generator or the way that processes were launched.
        StemmaError: see `stemma.train.sharding.check_sharding`.
    """
    sampled_at = getattr(generator, "temperature", config.temperature)
    if sampled_at != config.temperature and not config.importance_sampling_correction:
        raise ValueError(
            f"the generator samples at temperature {sampled_at} and the trainer scores at {config.temperature}: "
            "make them equal, or set importance_sampling_correction=True"
        )
    router_aux_loss_coef(model, config)
    if config.gradient_checkpointing and not getattr(base_model(model), "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(base_model(model)).__name__} has no gradient checkpointing; leave the option out")
    plugin = fsdp_plugin(accelerator)
    if plugin is not None:
        check_sharding(plugin, model)
        if config.max_tokens is not None:
            raise ValueError(
                "max_tokens streams trees in another number of forwards on each process, and FSDP needs the same "
                "number everywhere; drop max_tokens, or lower per_device_train_batch_size where memory is short"
            )
        if getattr(generator, "weights", None) == "sync":
            raise ValueError("weights='sync' sends whole models, and FSDP divides this one; use weights='fixed'")
    if config.shared_prefix or config.compare_every:
        enable(model)


class Trainer:
    """Trains a causal language model on its own completions, one optimiser step per call of `step`.

    Args:
        model: any transformers causal language model that `stemma.enable` accepts, or a peft model around one.
        config: see `Config`.
        prompts: see `PromptSource`, for example `ShuffledRows`.
        reward_funcs: see `Reward`; their weighted sum is the reward.
        processing_class: the tokenizer; it decodes completions for the reward functions.
        reward_weights: one per reward function; all 1 when None.
        generator: what samples; the policy itself, on this machine, when None.
        rollout: how completions are made; independent samples when not given.
        credit: advantages; `GroupCredit` with the options of `config` when None.
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
        generator: Generator | None = None,
        rollout: Rollout = independent_samples,
        credit: Credit | None = None,
        loss_mask: LossMask = all_tokens,
        ref_model: nn.Module | None = None,
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.config = config
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        weights = [1.0] * len(functions) if reward_weights is None else list(reward_weights)
        if not functions or len(weights) != len(functions):
            raise ValueError(
                f"reward_weights must have one entry per reward function, got {len(weights)} for {len(functions)} "
                "functions"
            )
        check(model, config, generator=generator, accelerator=self.accelerator)
        generator = generator or LocalGenerator(
            eos_token_id=end_token_ids(model, processing_class),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        self.model = model.to(self.accelerator.device)
        broadcast_parameters(self.accelerator, self.model)
        self.ref_model = ref_model
        if config.beta and ref_model is None and not hasattr(model, "disable_adapter"):
            self.ref_model = copy.deepcopy(model)
        if self.ref_model is not None:
            self.ref_model = self.ref_model.to(self.accelerator.device).eval().requires_grad_(False)
        if self.ref_model is not None and (config.shared_prefix or config.compare_every):
            enable(self.ref_model)
        if fsdp_plugin(self.accelerator) is not None:
            for each in (self.model, self.ref_model):
                if each is not None:
                    shard(self.accelerator, each)
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
        self.collector = RolloutCollector(
            config,
            generate=partial(self._sample, generator),
            policy=self.policy,
            reference=self._reference,
            reward_funcs=functions,
            reward_weights=weights,
            decode=partial(processing_class.decode, skip_special_tokens=True),
            prompts=prompts,
            rollout=rollout,
            credit=credit
            or GroupCredit(estimator=config.credit, scale_rewards=config.scale_rewards, accelerator=self.accelerator),
            loss_mask=loss_mask,
            accelerator=self.accelerator,
        )
        self.total_steps, self.completed_steps = config.max_steps, 0
        self._batch: RolloutBatch | None = None
        self._warned = False

    def _sample(self, generator: Generator, *arguments: Any, **options: Any) -> RolloutBatch:
        """Sampling in the precision that scores and trains: otherwise the sampler is another policy."""
        with self.policy.autocast():
            return sample(self.model, generator, self.config.max_completion_length, *arguments, **options)

    # ------------------------------------------------------------------ one step

    def step(self) -> dict[str, float]:
        """Sample when the last batch is used up, then take one optimiser step; returns what to log."""
        config, started = self.config, time.perf_counter()
        metrics: dict[str, float] = {}
        cycle = self.completed_steps % config.steps_per_rollout
        if cycle == 0:
            self._batch, metrics = self.collector.next_batch(self.completed_steps)
        assert self._batch is not None
        micro_batches, entropy_weight = self._optimiser_batch(self._batch, cycle)
        self.model.train()

        if config.compare_every and (self.completed_steps + 1) % config.compare_every == 0:
            # Whichever forward runs second finds warm caches, so the order alternates.
            plain_first = self.completed_steps // config.compare_every % 2 == 1
            metrics |= comparison(self.policy, micro_batches[0], entropy_weight, plain_first=plain_first)
        mode: Mode = "auto" if config.shared_prefix else "plain"
        chosen = GradientPass(self.policy, micro_batches, mode, entropy_weight)

        update_started = time.perf_counter()
        if not is_sharded(self.model):  # else the backward has summed them
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
        self._warn_of_another_sampler(metrics.get("sampling/sampling_logp_difference/mean", 0.0))
        self.completed_steps += 1
        metrics |= {"grad_norm": norm, "learning_rate": rate}
        metrics |= {"time/update": update_seconds, "time/step": time.perf_counter() - started}
        return metrics

    def _warn_of_another_sampler(self, gap: float) -> None:
        if gap > SAMPLING_GAP and not self._warned and not self.config.importance_sampling_correction:
            self._warned = True
            warnings.warn(
                f"the sampler's log-probabilities are {gap:.2f} nats a token from the trainer's in the mean, and "
                f"{SAMPLING_GAP} is more than rounding explains: it has other weights, another precision or other "
                "sampling options. Make them equal, or set importance_sampling_correction=True",
                stacklevel=3,
            )

    def _optimiser_batch(self, batch: RolloutBatch, cycle: int) -> tuple[list[RolloutBatch], float]:
        """The micro-batches of this step with the weight of every token, and the weight of a token's entropy."""
        config = self.config
        accumulation = config.gradient_accumulation_steps
        groups = config.per_device_train_batch_size // config.num_generations
        first = cycle % (config.micro_batches_per_generation // accumulation) * accumulation
        micro = [batch.groups(i * groups, (i + 1) * groups) for i in range(first, first + accumulation)]
        counted = [b.loss_mask if b.norm_mask is None else b.norm_mask for b in micro]
        tokens = [float(mask.sum()) for mask in counted if mask is not None]
        sequences, total = sum_over_processes(self.accelerator, [sum(map(len, micro)), sum(tokens)])
        for each, mask, own in zip(micro, counted, tokens, strict=True):
            assert each.loss_mask is not None
            local = own * accumulation * self.accelerator.num_processes
            each.weights = token_weights(
                each.loss_mask,
                config.loss_type,
                counted=mask,
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
            reward: pass@k), over the prompts with a scorable completion; NaN without any.
        """
        return self.collector.evaluate(rows, num_generations or self.config.num_generations)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's parameters that the next step depends on. All processes call it together."""
        return {
            "completed_steps": self.completed_steps,
            "generations": self.collector.generations,
            "optimizer": full_optimizer_state_dict(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "batches": self._gather_batches(),
            "hooks": {name: hook.state_dict() for name, hook in self.collector.hooks() if hasattr(hook, "state_dict")},
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
        self.completed_steps, self.collector.generations = state["completed_steps"], state["generations"]
        for name, hook in self.collector.hooks():
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        load_full_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
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
