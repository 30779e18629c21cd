"""Supervised training on labelled batches: the warm-up that gives reinforcement learning a policy to start from."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stemma.errors import InvalidBatchError
from stemma.train.distributed import broadcast_parameters, sum_gradients, sum_over_processes
from stemma.train.optimizer import adamw, apply_gradients, schedule

__all__ = ["IGNORED_LABEL", "Config", "Trainer"]

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the supervised `Trainer`; names and meanings are those of `transformers.TrainingArguments`."""

    max_steps: int = 500
    """Optimiser steps, >= 1."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW, >= 0; the default suits models of some 100,000 parameters."""
    lr_scheduler_type: str = "cosine"
    """Course of the learning rate after its warm-up."""
    warmup_steps: int = 20
    """Steps during which the learning rate rises from 0, >= 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay on matrices, >= 0."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of gradients, in [0, 1)."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients, in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        for name, low in (("max_steps", 1), ("learning_rate", 0), ("warmup_steps", 0), ("max_grad_norm", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)!r}")


class Trainer:
    """One optimiser step per batch, the loss being the mean over labelled tokens of all processes.

    Args:
        model: a causal language model that returns `logits`.
        config: see `Config`.
        batches: `batches(step)` gives the batch of that step, for all processes together: `input_ids`,
            `attention_mask` and `labels`, each (rows, length) int64; labels are -100 where nothing is to be learnt. It
            must be a function of `step` alone, so that a resumed run sees the same data.
        accelerator: an `accelerate.Accelerator`; made when None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        batches: Callable[[int], Mapping[str, Tensor]],
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.config, self.batches = config, batches
        self.model = model.to(self.accelerator.device)
        broadcast_parameters(self.accelerator, self.model)
        self.optimizer = adamw(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
        )
        self.scheduler = schedule(
            self.optimizer, config.lr_scheduler_type, warmup_steps=config.warmup_steps, total_steps=config.max_steps
        )
        self.total_steps, self.completed_steps = config.max_steps, 0

    def step(self) -> dict[str, float]:
        """One optimiser step; returns what to log.

        Raises:
            InvalidBatchError: the batch has no labelled token.
        """
        started = time.perf_counter()
        self.model.train()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch = {k: v[rank::world].to(self.accelerator.device) for k, v in self.batches(self.completed_steps).items()}
        labels = batch.pop("labels")[:, 1:]
        labelled = labels != IGNORED_LABEL
        (total,) = sum_over_processes(self.accelerator, [labelled.sum().item()])
        if not total:
            raise InvalidBatchError(
                f"the supervised batch of step {self.completed_steps} has no label other than {IGNORED_LABEL}; nothing "
                "can be learnt from it"
            )
        logits = self.model(**batch, use_cache=False).logits[:, :-1][labelled].float()
        loss = nn.functional.cross_entropy(logits, labels[labelled], reduction="sum") / total
        loss.backward()
        sum_gradients(self.accelerator, self.model.parameters())
        rate = self.scheduler.get_last_lr()[0]
        norm = apply_gradients(
            self.optimizer,
            self.scheduler,
            max_grad_norm=self.config.max_grad_norm,
            what=f"supervised step {self.completed_steps + 1}",
        )
        self.completed_steps += 1
        correct = (logits.argmax(-1) == labels[labelled]).sum().item()
        loss_sum, correct = sum_over_processes(self.accelerator, [loss.item(), correct])
        return {
            "loss": loss_sum,
            "mean_token_accuracy": correct / total,
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": float(total),
            "time/step": time.perf_counter() - started,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's parameters that the next step depends on."""
        return {
            "completed_steps": self.completed_steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.completed_steps = state["completed_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
