"""Train a model with GRPO on a verifiable task, each shared prompt encoded once.

Without options: a small Llama, made here and trained from scratch on DialLock with many-shot prompts; a supervised
warm-up, then GRPO; a few minutes on two cores. With --model and --dataset: the same on your checkpoint and data.

The run folder holds checkpoints and the final model (for from_pretrained), metrics.jsonl, report.md, report.json,
plot.png and config.resolved.json. Ctrl-C or SIGTERM finishes the step and saves; --resume continues to the same
numbers. Several processes: accelerate launch -m stemma.cli.main train ...
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stemma.errors import InvalidDataError

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma train`. Those that GRPO has too carry TRL's names and meanings."""

    model: str | None = None
    """Model folder or hub id; None: a small Llama, made here. Needs --dataset."""
    dataset: Path | None = None
    """JSONL file: GSM8K's question and answer, or prompt and answer. Needs --model."""
    output_dir: Path = Path("runs/train")
    """Run folder; must not exist yet, unless --resume is given."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, with the settings it was started with."""

    sft_steps: int | None = None
    """Supervised steps before GRPO; None: 600, with --model 0."""
    sft_learning_rate: float | None = None
    """Peak learning rate of the supervised steps; None: 3e-3, with --model 1e-5."""
    shots: int | None = None
    """Solved examples in each prompt; None: 12, with --model 8."""

    max_steps: int = 100
    """GRPO steps (optimiser updates)."""
    num_generations: int = 8
    """Completions per prompt."""
    per_device_train_batch_size: int = 64
    """Completions of one micro-batch on one process; a multiple of num_generations."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimiser step."""
    num_iterations: int | None = None
    """Times that each sampled batch is optimised; None: 2, with --model 1."""
    max_completion_length: int | None = None
    """Tokens after which a completion is cut off; None: 72, with --model 256."""
    temperature: float = 1.0
    """Sampling temperature."""
    learning_rate: float | None = None
    """Peak learning rate of GRPO; None: 2e-4, with --model 1e-6."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = None
    """Course of GRPO's learning rate over max_steps; None: constant, with --model linear."""
    adam_beta2: float | None = None
    """AdamW's decay of squared gradients in GRPO; None: 0.95, with --model 0.999."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = "dapo"
    """Denominator of the loss: tokens of the sequence (grpo), max_completion_length (dr_grpo), tokens of the optimiser
    batch (dapo, cispo), tokens of the micro-batch (bnpo)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not."""
    epsilon: float = 0.2
    """Ratios are clipped from below at 1 - epsilon."""
    epsilon_high: float | None = None
    """Ratios are clipped from above at 1 + epsilon_high; None: epsilon. For cispo the ceiling itself."""
    beta: float = 0.0
    """Weight of the KL divergence from the model before GRPO; 0 loads no reference model."""
    use_peft: bool = False
    """Train a LoRA adapter on all linear layers instead of all parameters (needs the extra `peft`)."""
    lora_r: int = 16
    """Rank of the LoRA adapter."""

    shared_prefix: bool = True
    """Encode each shared prefix once; without it every row goes through the plain forward."""
    max_tokens: int | None = None
    """Token budget of one forward; larger trees are streamed in less memory. None: no limit."""
    compare_every: int = 10
    """Every so many steps the same batch also takes the other forward, for losses, gradients and time; 0: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    bf16: bool = False
    """Run forwards under bfloat16 autocast."""

    eval_prompts: int = 32
    """Held-out prompts sampled before and after GRPO; 0: no evaluation."""
    eval_steps: int = 0
    """Evaluate every so many GRPO steps too; 0: only before and after."""
    save_steps: int = 50
    """Optimiser steps between two checkpoints."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    seed: int = 42
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.dataset is None):
            raise ValueError("give --model and --dataset together, or neither for the embedded task")
        for name, low in (("shots", 0), ("sft_steps", 0), ("eval_prompts", 0), ("eval_steps", 0), ("save_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        if self.save_total_limit < 1 or self.lora_r < 1:
            raise ValueError(
                f"save_total_limit and lora_r must be at least 1; got {self.save_total_limit}, {self.lora_r}"
            )
        from stemma.cli._train_run import grpo_config

        grpo_config(self)  # the method's own checks, before any work


_STORED = "config.resolved.json"

# What None stands for: without --model, and with it.
_EMBEDDED = {
    "sft_steps": 600,
    "sft_learning_rate": 3e-3,
    "shots": 12,
    "num_iterations": 2,
    "max_completion_length": 72,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
}
_CHECKPOINT = {
    "sft_steps": 0,
    "sft_learning_rate": 1e-5,
    "shots": 8,
    "num_iterations": 1,
    "max_completion_length": 256,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "adam_beta2": 0.999,
}


def main(config: Config) -> dict[str, Any]:
    """Run or resume a training run; the result is its report."""
    from accelerate import Accelerator

    from stemma.cli._train_run import Run
    from stemma.train.report import require_matplotlib

    require_matplotlib()
    accelerator = Accelerator()
    if accelerator.is_main_process:
        _open_folder(config)
    accelerator.wait_for_everyone()
    return Run(_stored_config(config.output_dir), accelerator, resume=config.resume).train()


def resolve(config: Config) -> Config:
    """The settings with every None that stands for a default of the job replaced."""
    defaults: dict[str, Any] = _EMBEDDED if config.model is None else _CHECKPOINT
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def _open_folder(config: Config) -> None:
    """Make a new run folder, or check that an old one is resumed with its own settings.

    Raises:
        InvalidDataError: the folder exists without --resume, does not with it, or the settings differ.
    """
    from stemma.train.checkpoint import write_json

    folder, stored_path = config.output_dir, config.output_dir / _STORED
    if not config.resume:
        # A run that was refused before it began left its settings and nothing else: nothing is lost by starting anew.
        if folder.exists() and (not folder.is_dir() or any(item.name != _STORED for item in folder.iterdir())):
            raise InvalidDataError(
                f"the run folder '{folder}' exists already; continue it with --resume, or choose another --output-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(resolve(config))
        write_json(stored_path, {key: str(v) if isinstance(v, Path) else v for key, v in values.items()})
        return
    if not stored_path.is_file():
        raise InvalidDataError(f"there is no run to resume in '{folder}' (no {_STORED}); leave out --resume")
    stored = _stored_config(folder)
    for field in dataclasses.fields(Config):
        given, kept = getattr(config, field.name), getattr(stored, field.name)
        if field.name not in ("resume", "output_dir") and given not in (field.default, kept):
            raise InvalidDataError(
                f"{field.name} is {kept!r} in the run folder '{folder}', not {given!r}; a resumed run keeps its "
                "settings"
            )


def _stored_config(folder: Path) -> Config:
    """The settings that a run folder was made with, read back from it."""
    values = json.loads((folder / _STORED).read_text(encoding="utf-8"))
    values["dataset"] = None if values["dataset"] is None else Path(values["dataset"])
    return Config(**{**values, "output_dir": folder})
