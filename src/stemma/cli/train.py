"""Train a model with GRPO and the methods around it on a verifiable task, each shared prefix encoded once.

Without options: a small Llama, made here and trained from scratch on DialLock with many-shot prompts; a supervised
warm-up, then GRPO; a few minutes on two cores. With --model and --dataset: the same on your checkpoint and data.

--method chooses where prompts and completions come from and what is trained on, --credit the advantages; tree credit
goes with every method. --config reads any of the options from a YAML file.

The run folder holds checkpoints and the final model (for from_pretrained), metrics.jsonl, report.md, report.json,
plot.png and config.resolved.yaml. Ctrl-C or SIGTERM finishes the step and saves; --resume continues to the same
numbers. Several processes: accelerate launch -m stemma.cli.main train ...
"""

import dataclasses
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stemma.cli import _flags
from stemma.errors import InvalidDataError
from stemma.files import locked, write_text
from stemma.rl.engine.options import Config as GRPOConfig
from stemma.rl.engine.options import (
    PPPOConfig,
    PrefixRFTConfig,
    PrefixRLConfig,
    ScaleRewards,
    SchedulerType,
    TempoConfig,
)

__all__ = ["Config", "main"]

Method = Literal["grpo", "prefix-rft", "prefix-rl", "pppo"]
ReportTo = Literal["none", "tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A vLLM or SGLang server that samples instead of the model in this process (`stemma.decode.server`)."""

    url: str | None = None
    """Root of the server, such as http://localhost:8000; None: the model samples in this process."""
    dialect: Literal["vllm", "sglang"] = "vllm"
    """Which server it is."""
    weights_dir: Path | None = None
    """Folder that the server can read too: gets the policy's weights whenever they change. None: the server keeps its
    own weights, which needs --importance-sampling-correction."""
    processed_logprobs: bool = False
    """The vLLM server was started with --logprobs-mode processed_logprobs; needed at temperatures other than 1."""


@dataclass(frozen=True, kw_only=True)
class Config(GRPOConfig):
    """Flags of `stemma train`: those of GRPO, and what a run needs beside them.

    None stands for a default that depends on the job (with or without --model) or on the method.
    """

    model: str | None = None
    """Model folder or hub id; None: a small Llama, made here. Needs --dataset."""
    dataset: Path | None = None
    """JSONL file: GSM8K's question and answer, or prompt and answer. The reward is 1 if a completion's first line that
    begins with #### or A: gives the answer's number; other rewards: in Python. Needs --model."""
    output_dir: Path = Path("runs/train")
    """Run folder; must not exist yet, unless --resume is given."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, with the settings it was started with."""

    method: Method = "grpo"
    """grpo; prefix-rft (some completions continue a demonstration: the JSONL field demonstration, else GSM8K's answer);
    prefix-rl (problems that begin with part of a solution, see --traces); pppo (train on beginnings alone)."""
    credit: Literal["grpo", "rloo", "tempo"] = "grpo"  # type: ignore[assignment]
    """Advantages: relative to the group (grpo), to the others (rloo), or with credit where completions part (tempo)."""
    traces: Path | None = None
    """JSONL file of verified solutions, written by `stemma collect`; needed by --method prefix-rl."""
    tempo: TempoConfig = field(default_factory=TempoConfig)
    """With --credit tempo."""
    prefix_rft: PrefixRFTConfig = field(default_factory=PrefixRFTConfig)
    """With --method prefix-rft."""
    prefix_rl: PrefixRLConfig = field(default_factory=PrefixRLConfig)
    """With --method prefix-rl."""
    pppo: PPPOConfig = field(default_factory=PPPOConfig)
    """With --method pppo."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Sampling by a server, with --server.url."""
    stop_strings: tuple[str, ...] = ()
    """A completion also ends with any of these texts."""

    sft_steps: int | None = None
    """Supervised steps before GRPO; None: 600, with --model 0."""
    sft_learning_rate: float | None = None
    """Peak learning rate of the supervised steps; None: 3e-3, with --model 1e-5."""
    shots: int | None = None
    """Solved examples in each prompt; None: 12, with --model 8."""
    use_peft: bool = False
    """Train a LoRA adapter on all linear layers instead of all parameters (needs the extra `peft`)."""
    lora_r: int = 16
    """Rank of the LoRA adapter."""

    eval_prompts: int = 32
    """Held-out prompts sampled before and after GRPO; 0: no evaluation."""
    eval_steps: int | None = None
    """Evaluate every so many GRPO steps too; 0: only before and after. None: 0, with --method pppo 10."""
    save_steps: int = 50
    """Optimiser steps between two checkpoints."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    report_to: tuple[ReportTo, ...] = ("none",)
    """Trackers beside metrics.jsonl, one or several (tensorboard and trackio: the extra `track`)."""

    num_iterations: int | None = None  # type: ignore[assignment]
    """Times that each sampled batch is optimised (mu of GRPO); None: 2, with --model 1."""
    max_completion_length: int | None = None  # type: ignore[assignment]
    """Tokens after which a completion is cut off; None: 72, with --model 256."""
    learning_rate: float | None = None  # type: ignore[assignment]
    """Peak learning rate of AdamW in GRPO; None: 2e-4, with --model 1e-6."""
    lr_scheduler_type: SchedulerType | None = None  # type: ignore[assignment]
    """Course of GRPO's learning rate after its warm-up; None: constant, with --model linear."""
    adam_beta2: float | None = None  # type: ignore[assignment]
    """AdamW's decay of the mean of squared gradients in GRPO; None: 0.95, with --model 0.999."""
    scale_rewards: ScaleRewards | None = None  # type: ignore[assignment]
    """Divide advantages by the standard deviation of the group, of the batch, or not at all; None: group, with --method
    prefix-rl none."""
    compare_every: int = 10
    """Every so many steps, also send the batch through the other forward (shared or plain) and log its loss, gradient
    difference and time, without an optimiser step; 0: never."""

    def __post_init__(self) -> None:
        if resolve(self) is not self:
            return  # the complete settings have passed these checks
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
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise ValueError(f"report_to must be none, or one or several trackers; got {' '.join(self.report_to)!r}")
        if (self.method == "prefix-rl") != (self.traces is not None) and not self.resume:
            raise ValueError("--method prefix-rl and --traces belong together: `stemma collect` writes the file")
        self._check_groups()
        if self.server.url is None and self.server != ServerConfig():
            raise ValueError("--server options do nothing without --server.url; add it, or leave them out")
        if self.server.url and self.server.weights_dir is None and not self.importance_sampling_correction:
            raise ValueError(
                "a server with weights of its own samples off-policy: give --server.weights-dir, by which it follows "
                "the policy, or --importance-sampling-correction"
            )
        if self.stop_strings and self.model is None:
            raise ValueError("stop_strings need --model: the embedded task's tokenizer knows 21 characters only")
        grpo_options(self)  # the trainer's own checks, before any work
        if self.method == "pppo" and self.pppo.eta_step and not (self.eval_steps and self.eval_prompts):
            raise ValueError(
                "pppo trains on more of each output when evaluation stalls: give --eval-steps and --eval-prompts above "
                "0, or keep the share fixed with --pppo.eta-step 0"
            )

    def _check_groups(self) -> None:
        """Refuse options of a method that is not chosen: they would do nothing."""
        for name in _GROUPS:
            group = getattr(self, name)
            given, usual = _flags.flat(group), _flags.flat(type(group)())
            changed = [option for option, value in given.items() if value != usual[option]]
            if changed and name not in chosen_groups(self):
                flag = f"--{name}.{changed[0]}".replace("_", "-")
                switch = "--credit tempo" if name == "tempo" else f"--method {name.replace('_', '-')}"
                raise ValueError(f"{flag} does nothing without {switch}; add it, or leave the option out")


_GROUPS = ("tempo", "prefix_rft", "prefix_rl", "pppo")
_STORED = "config.resolved.yaml"

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
    from stemma.cli._train_run import Run
    from stemma.train.distributed import check_accelerator
    from stemma.train.report import require_matplotlib
    from stemma.train.tracking import make_accelerator

    require_matplotlib()
    accelerator = make_accelerator(config.report_to, config.output_dir)
    check_accelerator(accelerator, bf16=config.bf16)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            if not config.resume and not config.output_dir.exists():
                config.output_dir.mkdir(parents=True)
            if config.output_dir.exists():
                stack.enter_context(locked(config.output_dir))
            _open_folder(config)
        accelerator.wait_for_everyone()
        stored = _stored_config(config.output_dir)
        if accelerator.is_main_process:
            print((config.output_dir / _STORED).read_text(encoding="utf-8"), file=sys.stderr)
        return Run(stored, accelerator, resume=config.resume).train()


def chosen_groups(config: Config) -> list[str]:
    """The groups of options that the run uses."""
    return [name for name in _GROUPS if name in (config.credit, config.method.replace("-", "_"))]


def resolve(config: Config) -> Config:
    """The settings with every None that stands for a default of the job or the method replaced."""
    defaults: dict[str, Any] = dict(_EMBEDDED if config.model is None else _CHECKPOINT)
    defaults |= {"scale_rewards": "group", "eval_steps": 10 if config.method == "pppo" else 0}
    for name in chosen_groups(config):
        defaults |= getattr(getattr(config, name), "grpo_options", {})
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing) if missing else config


def grpo_options(config: Config) -> GRPOConfig:
    """The trainer's options among settings that are complete."""
    names = [each.name for each in dataclasses.fields(GRPOConfig)]
    credit = "grpo" if config.credit == "tempo" else config.credit
    return GRPOConfig(**{name: getattr(config, name) for name in names} | {"credit": credit})


def _open_folder(config: Config) -> None:
    """Make a new run folder, or check that an old one is resumed with its own settings.

    Raises:
        InvalidDataError: the folder exists without --resume, does not with it, or the settings differ.
    """
    folder, stored_path = config.output_dir, config.output_dir / _STORED
    if not config.resume:
        # A run that was refused before it began left its settings and nothing else: nothing is lost by starting anew.
        if folder.exists() and (
            not folder.is_dir() or any(item.name not in (_STORED, ".lock") for item in folder.iterdir())
        ):
            raise InvalidDataError(
                f"the run folder '{folder}' exists already; continue it with --resume, or choose another --output-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        unused = [name for name in _GROUPS if name not in chosen_groups(config)]
        text = _flags.to_yaml(resolve(config), leave_out=["resume", "output_dir", *unused])
        write_text(stored_path, text)
        return
    if not stored_path.is_file():
        raise InvalidDataError(f"there is no run to resume in '{folder}' (no {_STORED}); leave out --resume")
    default, given, kept = (_flags.flat(each) for each in (Config(), config, _stored_config(folder)))
    for name, value in given.items():
        if name not in ("resume", "output_dir") and value not in (default[name], kept[name]):
            raise InvalidDataError(
                f"{name} is {kept[name]!r} in the run folder '{folder}', not {value!r}; a resumed run keeps its "
                "settings"
            )


def _stored_config(folder: Path) -> Config:
    """The settings that a run folder was made with, read back from it."""
    arguments = ["--config", str(folder / _STORED), "--output-dir", str(folder)]
    config, _ = _flags.parse("train", sys.modules[__name__], arguments)
    return config
