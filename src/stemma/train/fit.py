"""One loop for every training run: a trainer takes steps; the loop evaluates, tracks, saves, and stops when asked to.

```python
import torch
from stemma.models.tiny import tiny_model
from stemma.train import fit, sft

model = tiny_model("llama", vocab_size=64)
ids = torch.arange(32).reshape(2, 16)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
trainer = fit.Trainer(
    model,
    fit.Config(max_steps=20),
    batches=lambda step: batch,
    loss=sft.token_loss,
    num_items=sft.labelled_tokens,
)
losses: list[float] = []
fit.run_steps(trainer, on_step=lambda metrics: losses.append(metrics["loss"]))
print(losses[-1] < losses[0])
# prints: True
```
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from stemma.errors import InvalidBatchError
from stemma.train.checkpoint import StopSignal
from stemma.train.distributed import any_process, broadcast_parameters, sum_gradients, sum_over_processes
from stemma.train.optimizer import adamw, apply_gradients, schedule
from stemma.train.tracking import Tracker

__all__ = ["Config", "Loss", "Trainer", "run_steps"]

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, float]]]
"""`loss(model, batch)`: the losses of a batch's items, summed, and sums of what else is to be logged."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a `Trainer`; names and meanings are those of `transformers.TrainingArguments`."""

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
    gradient_accumulation_steps: int = 1
    """Parts of a batch that go through the model one after the other, >= 1; the step is that of the whole batch."""

    def __post_init__(self) -> None:
        positive = ("max_steps", "gradient_accumulation_steps")
        for name in (*positive, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            low = int(name in positive)
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)!r}")


class Trainer:
    """One optimiser step per batch, on the mean loss over its items in all processes and parts.

    Args:
        model: trained in place; moved to the accelerator's device.
        config: see `Config`.
        batches: `batches(step)` gives the batch of that step, for all processes together: tensors `(rows, ...)`. It
            must be a function of `step` alone, so that a resumed run sees the same data.
        loss: see `Loss`.
        num_items: how many items `loss` sums over for a batch, such as tokens with a label.
        accelerator: an `accelerate.Accelerator`; made when None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        batches: Callable[[int], Batch],
        loss: Loss,
        num_items: Callable[[Batch], int],
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.config, self.batches, self.loss, self.num_items = config, batches, loss, num_items
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
            InvalidBatchError: the batch has no item.
            NonFiniteError: the gradient is not finite; the parameters are untouched.
        """
        started = time.perf_counter()
        self.model.train()
        parts = self._parts(self.batches(self.completed_steps))
        (total,) = sum_over_processes(self.accelerator, [float(sum(map(self.num_items, parts)))])
        if not total:
            raise InvalidBatchError(
                f"the batch of step {self.completed_steps} has no item with a loss (of tokens: no label other than "
                "-100); nothing can be learnt from it"
            )
        sums: dict[str, float] = {"loss": 0.0}
        for part in parts:
            loss, others = self.loss(self.model, part)
            mean = loss / total
            mean.backward()
            for name, value in {"loss": mean.item(), **{key: each / total for key, each in others.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value
        sum_gradients(self.accelerator, self.model.parameters())
        rate = self.scheduler.get_last_lr()[0]
        norm = apply_gradients(
            self.optimizer,
            self.scheduler,
            max_grad_norm=self.config.max_grad_norm,
            what=f"step {self.completed_steps + 1}",
        )
        self.completed_steps += 1
        sums = dict(zip(sums, sum_over_processes(self.accelerator, list(sums.values())), strict=True))
        return {
            **sums,
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": float(total),
            "time/step": time.perf_counter() - started,
        }

    def _parts(self, batch: Batch) -> list[Batch]:
        """This process's rows, in as many parts as there are accumulation steps; parts without a row are left out."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = {name: rows[rank::world].to(self.accelerator.device) for name, rows in batch.items()}
        count = self.config.gradient_accumulation_steps
        parts: list[Batch] = [{name: rows[part::count] for name, rows in own.items()} for part in range(count)]
        return [part for part in parts if len(next(iter(part.values())))] or parts[:1]

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


class Stepper(Protocol):
    """A trainer, as the loop sees it."""

    accelerator: Any
    completed_steps: int
    total_steps: int

    def step(self) -> Mapping[str, float]:
        """Take one optimiser step and return what to log."""
        ...


def run_steps(
    trainer: Stepper,
    *,
    phase: str = "train",
    steps_before: int = 0,
    on_step: Callable[[Mapping[str, float]], None] | None = None,
    tracker: Tracker | None = None,
    save: Callable[[Mapping[str, float]], None] | None = None,
    save_steps: int = 1,
    stop: StopSignal | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_steps: int = 0,
) -> bool:
    """Run a trainer to its last step.

    Args:
        phase: name of this part of the run, in the rows.
        steps_before: optimiser steps of earlier phases.
        on_step: called with the metrics after each step.
        tracker: logs the metrics; None on processes that do not report.
        save: writes a checkpoint; gets the metrics of the step. Called on every process.
        save_steps: steps between two checkpoints; the last step is always saved.
        stop: a signal on any process stops all of them after the same step.
        evaluate: measures the model; called before the first step, after the last and every `eval_steps` between (0:
            never between). Its rows have the phase "eval".

    Returns:
        Whether the last step was reached; False after a signal. Either way `save` was called after the last step taken.
    """
    while True:
        done, total = trainer.completed_steps, trainer.total_steps
        if evaluate is not None and (done in (0, total) or (eval_steps and done % eval_steps == 0)):
            measured = evaluate()
            if tracker is not None:
                tracker.log("eval", done, steps_before + done, measured)
        if done == total:
            return True
        metrics = trainer.step()
        if tracker is not None:
            tracker.log(phase, trainer.completed_steps, steps_before + trainer.completed_steps, metrics)
        if on_step is not None:
            on_step(metrics)
        stopped = stop is not None and any_process(trainer.accelerator, stop.requested is not None)
        finished = trainer.completed_steps == total
        if save is not None and (stopped or finished or trainer.completed_steps % save_steps == 0):
            save(metrics)
        if stopped and not finished:
            return False
