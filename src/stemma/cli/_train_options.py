"""The options of `stemma train`: its flags, what stands for a default, and a group of flags for a chosen method.

Methods are found by their place, the files of `stemma.rl` that offer `hooks`, and read without importing them; only a
method that is chosen is imported, and torch with it.
"""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from stemma.cli.methods import method_files, method_name
from stemma.rl.engine.options import Config as GRPOConfig
from stemma.rl.engine.options import CreditName, SchedulerType

__all__ = ["Config", "chosen", "config_class", "grpo_options", "method_module", "needs", "resolve"]

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

    None stands for a default that depends on the job (with or without --model); `config_class` sets those of a method.
    """

    first_flags: ClassVar[tuple[str, ...]] = (
        *("model", "dataset", "output_dir", "resume", "method", "credit", "use_peft", "eval_prompts", "report_to"),
        *("num_generations", "max_completion_length", "temperature", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "learning_rate", "loss_type", "beta", "max_tokens", "bf16", "seed"),
    )

    model: str | None = None
    """Model folder or hub id; None: a small Llama, made here. Needs --dataset."""
    dataset: Path | None = None
    """JSONL file: GSM8K's question and answer, or prompt and answer. The reward is 1 if a completion's first line that
    begins with #### or A: gives the answer's number; other rewards: in Python. Needs --model."""
    output_dir: Path = Path("runs/train")
    """Run folder; must not exist yet, unless --resume is given."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, with the settings it was started with."""

    method: str = "grpo"
    """Where prompts and completions come from and what is trained on; `stemma methods` tells what each is for."""
    credit: str = "grpo"  # type: ignore[assignment]
    """Advantages: relative to the group (grpo), to the others of the group (rloo), or those of a method that gives
    nothing else; goes with every method that has no credit of its own."""
    traces: Path | None = None
    """JSONL file of verified solutions, written by `stemma collect`, for a method that begins with parts of them."""
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
    eval_steps: int = 0
    """Evaluate every so many GRPO steps too; 0: only before and after."""
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
    """Peak learning rate of AdamW in GRPO; None: 2e-4, with --model 1e-6, which is TRL's default and learns nothing
    visible in some hundred steps. Try 3e-6 for all weights, 2e-4 with --use-peft."""
    lr_scheduler_type: SchedulerType | None = None  # type: ignore[assignment]
    """Course of GRPO's learning rate after its warm-up; None: constant, with --model linear."""
    adam_beta2: float | None = None  # type: ignore[assignment]
    """AdamW's decay of the mean of squared gradients in GRPO; None: 0.95, with --model 0.999."""
    compare_every: int = 10  # with the help of the trainer's option

    def __post_init__(self) -> None:
        if resolve(self) is not self:
            return  # the complete settings have passed these checks
        if (self.model is None) != (self.dataset is None):
            raise ValueError("give --model and --dataset together, or neither for the embedded task")
        from_zero = ("shots", "sft_steps", "sft_learning_rate", "eval_prompts", "eval_steps")
        for name, low in (*((name, 0) for name in from_zero), ("save_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        if self.save_total_limit < 1 or self.lora_r < 1:
            raise ValueError(
                f"save_total_limit and lora_r must be at least 1; got {self.save_total_limit}, {self.lora_r}"
            )
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise ValueError(f"report_to must be none, or one or several trackers; got {' '.join(self.report_to)!r}")
        self._check_needs()
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

    def _check_needs(self) -> None:
        """Refuse a method without what it needs, and traces that no method asks for."""
        asked = needs(self)
        if "traces" in asked and self.traces is None and not self.resume:
            raise ValueError(f"--method {self.method} needs --traces, the file that `stemma collect` writes")
        if "traces" not in asked and self.traces is not None and not self.resume:
            raise ValueError(f"--traces does nothing with --method {self.method}; leave it out, or choose another one")
        if "evaluation" in asked and not (self.eval_steps and self.eval_prompts):
            raise ValueError(
                f"--method {self.method} follows evaluations while it trains: give --eval-steps and --eval-prompts "
                "above 0"
            )


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


def chosen(config: Config) -> dict[str, Any]:
    """The options of the chosen methods, by their names; None for a method that has none."""
    methods = [name for name in (config.credit, config.method) if name not in get_args(CreditName)]
    return {name: getattr(config, name.replace("-", "_"), None) for name in methods}


def needs(config: Config) -> set[str]:
    """What the chosen methods ask of the run."""
    return {need for options in chosen(config).values() for need in getattr(options, "needs", ())}


def resolve(config: Config) -> Config:
    """The settings with every None that stands for a default replaced."""
    defaults: dict[str, Any] = _EMBEDDED if config.model is None else _CHECKPOINT
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing) if missing else config


def grpo_options(config: Config) -> GRPOConfig:
    """The trainer's options among settings that are complete."""
    names = [each.name for each in dataclasses.fields(GRPOConfig)]
    credit = config.credit if config.credit in get_args(CreditName) else "grpo"
    return GRPOConfig(**{name: getattr(config, name) for name in names} | {"credit": credit})


def method_module(name: str) -> Any:
    """The module of a method."""
    return import_module(f"stemma.rl.{name.replace('-', '_')}")


def config_class(given: Mapping[str, Any]) -> type[Config]:
    """`Config` with the defaults of each chosen method and a group of its options.

    Args:
        given: the options that a person gave, by their names; those of a group as `group.option`.

    Raises:
        ValueError: an option of a method that is not chosen.
    """
    names = _methods()
    methods = [name for name in names if name in (given.get("credit"), given.get("method"))]
    for option in given:
        name = option.partition(".")[0].replace("_", "-")
        if name in names and name not in methods:
            raise ValueError(f"--{option.replace('_', '-')} needs --method {name} or --credit {name}")
    hints = get_type_hints(Config)
    options: dict[str, tuple[Any, Any]] = {}
    for name in methods:
        group = getattr(method_module(name), "Config", None)
        if group is not None:
            options |= {option: (hints[option], value) for option, value in getattr(group, "defaults", {}).items()}
            options[name.replace("-", "_")] = (group, field(default_factory=group))
    options["method"] = (Literal[("grpo", *names)], "grpo")
    options["credit"] = (Literal[(*get_args(CreditName), *names)], "grpo")
    added = [(name, *kind_and_default) for name, kind_and_default in options.items()]
    return dataclasses.make_dataclass("TrainConfig", added, bases=(Config,), frozen=True, kw_only=True)


def _methods() -> list[str]:
    """The names of the methods, found by their place and not imported."""
    found = []
    for folder in import_module("stemma.rl").__path__:
        for path in method_files(Path(folder)):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
            imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
            if "hooks" in functions | imported:
                found.append(method_name(path))
    return found
