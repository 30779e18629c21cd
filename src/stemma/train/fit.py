"""The loop around a trainer's steps: track, save now and then, stop cleanly when asked to."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from stemma.train.checkpoint import StopSignal
from stemma.train.distributed import any_process
from stemma.train.tracking import Tracker

__all__ = ["Stepper", "run_steps"]


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
    phase: str,
    steps_before: int,
    tracker: Tracker | None,
    save: Callable[[Mapping[str, float]], None],
    save_steps: int,
    stop: StopSignal,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_steps: int = 0,
) -> bool:
    """Run a trainer to its last step.

    Args:
        phase: name of this part of the run, in the rows.
        steps_before: optimiser steps of earlier phases.
        tracker: None on processes that do not report.
        save: writes a checkpoint; gets the metrics of the step. Called on every process.
        save_steps: steps between two checkpoints; the last step is always saved.
        stop: a signal on any process stops all of them after the same step.
        evaluate: measures the model; called before the first step, after the last and every `eval_steps` between (0:
            never between). Its rows have the phase "eval".

    Returns:
        Whether the last step was reached; False after a signal. Either way a checkpoint of the last step taken exists.
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
        stopped = any_process(trainer.accelerator, stop.requested is not None)
        finished = trainer.completed_steps == total
        if stopped or finished or trainer.completed_steps % save_steps == 0:
            save(metrics)
        if stopped and not finished:
            return False
