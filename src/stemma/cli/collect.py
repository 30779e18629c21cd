"""Collect verified solutions by rejection sampling, for training on problems that begin with part of one.

Samples each problem until the first completion that the verifier accepts, or until --max-samples have failed, and
writes one line per problem to --output: the --traces of `stemma train`. Problems that `stemma train`
holds out for evaluation with the same --seed and --eval-prompts are never sampled.

Without --model: the small Llama of `stemma train` on DialLock, after the same supervised warm-up. With --model and
--dataset: your checkpoint and data. Ctrl-C or SIGTERM stops after the round; --resume continues to the same file.
"""

import dataclasses
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.errors import InvalidDataError, StemmaError
from stemma.files import locked

if TYPE_CHECKING:
    from stemma.cli._train_jobs import Job
    from stemma.data.traces import Trace
    from stemma.train.checkpoint import StopSignal

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma collect`. None stands for the default of `stemma train`."""

    model: str | None = None
    """Model folder or hub id; None: a small Llama, made here. Needs --dataset."""
    dataset: Path | None = None
    """JSONL file: GSM8K's question and answer, or prompt and answer. A completion is accepted if its first line that
    begins with #### or A: gives the answer's number, cut off behind it or not. Needs --model."""
    output: Path = Path("runs/traces.jsonl")
    """JSONL file to write; must not exist yet, unless --resume is given."""
    resume: bool = False
    """Continue the file of a collection that was interrupted, or that had a smaller --limit; other flags as before."""
    limit: int | None = None
    """Problems to take; None: 100, with --dataset all."""

    samples_per_round: int = 64
    """Completions of a problem that are sampled together."""
    max_samples: int = 2500
    """Completions after which a problem is given up."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_completion_length: int | None = None
    """Tokens after which a completion is cut off; None: 72, with --model 256."""
    stop_strings: tuple[str, ...] = ()
    """A completion also ends with any of these texts. Needs --model."""
    shots: int | None = None
    """Solved examples in each prompt; None: 12, with --model 8."""
    sft_steps: int | None = None
    """Supervised steps of the small Llama; None: 600. Not with --model."""
    eval_prompts: int = 32
    """Prompts of --dataset that are held out for evaluation."""
    seed: int = 42
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.dataset is None):
            raise ValueError("give --model and --dataset together, or neither for the embedded task")
        if self.model is not None and self.sft_steps is not None:
            raise ValueError("--sft-steps is of the embedded task; leave it out with --model")
        if self.model is None and self.stop_strings:
            raise ValueError("--stop-strings need --model: the embedded task's tokenizer knows 21 characters only")
        lowest = {"limit": 1, "samples_per_round": 1, "max_samples": 1, "max_completion_length": 1}
        for name, low in {**lowest, "shots": 0, "sft_steps": 0, "eval_prompts": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")


def main(config: Config) -> dict[str, Any]:
    """Collect; the result is what it found and cost, or, after a signal, how to go on."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise StemmaError("a collection is the work of one process: several would write to one file; launch it alone")
    if config.resume and not config.output.exists():
        raise InvalidDataError(f"there is no collection to resume in '{config.output}'; leave out --resume")
    with locked(config.output):
        return _collect(config, accelerator)


def _collect(config: Config, accelerator: Any) -> dict[str, Any]:
    from transformers.utils import logging

    from stemma.cli._train_jobs import make_job
    from stemma.cli._train_options import Config as TrainConfig
    from stemma.cli._train_options import resolve
    from stemma.data.traces import TraceFile, totals
    from stemma.decode.rollout import LocalGenerator
    from stemma.rl.engine.collect import collect_traces
    from stemma.rl.engine.hooks import end_token_ids
    from stemma.train.checkpoint import StopSignal

    new = not config.output.exists()
    # A collection that failed before its first problem left an empty file: nothing is lost by starting anew.
    if not new and not config.resume and (not config.output.is_file() or config.output.stat().st_size):
        raise InvalidDataError(f"'{config.output}' exists; continue it with --resume, or choose another --output")
    with TraceFile(config.output) as file:  # refuses a file that cannot be used before a model is loaded
        done = len(file.traces)
    if new:
        config.output.unlink()  # until there is something to write
    logging.disable_progress_bar()
    names = ("model", "dataset", "shots", "max_completion_length", "sft_steps", "eval_prompts", "seed")
    settings = resolve(TrainConfig(**{name: getattr(config, name) for name in names}))
    job = make_job(settings)
    job.check(settings.max_completion_length or 1)
    problems = _problems(job, config.limit)
    with StopSignal() as stop, _Progress(len(problems), done) as progress:
        job.model.to(accelerator.device)
        _warm_up(job, settings, stop)
        traces = collect_traces(
            job.model,
            problems,
            job.reward,
            processing_class=job.processing_class,
            max_completion_length=settings.max_completion_length or 1,
            generator=LocalGenerator(
                eos_token_id=end_token_ids(job.model, job.processing_class),
                temperature=config.temperature,
                stop_strings=config.stop_strings or None,
                tokenizer=job.processing_class if config.stop_strings else None,
            ),
            samples_per_round=config.samples_per_round,
            max_samples=config.max_samples,
            seed=config.seed,
            source=_source(config, settings, job),
            path=config.output,
            on_trace=progress.show,
            should_stop=lambda: stop.requested is not None,
        )
    found = totals(traces)
    print(
        f"{found['solved']} of {len(traces)} problems solved with {found['samples']:,} samples, "
        f"{found['tokens']:,} tokens, about {found['flops']:.2g} FLOPs: {config.output}"
    )
    unsolved = [index for index, trace in enumerate(traces) if not trace.solved]
    result = {"command": "collect", "output": str(config.output), **found, "unsolved": unsolved}
    if len(traces) < len(problems):
        return {**result, **_interrupted(config, stop.requested or signal.SIGTERM, len(problems))}
    if not found["solved"]:
        print("nothing to train on: raise --max-samples, or take a stronger model or easier problems", file=sys.stderr)
    return {**result, "status": "finished"}


def _problems(job: "Job", limit: int | None) -> Sequence[Mapping[str, Any]]:
    if job.rows:
        return [job.rows[index] for index in range(min(limit or len(job.rows), len(job.rows)))]
    return job.prompts(0, limit or 100)


def _warm_up(job: "Job", settings: Any, stop: "StopSignal") -> None:
    """The supervised steps of `stemma train`, which give the small Llama its first successes."""
    from stemma.cli._train_jobs import supervised_trainer

    if not settings.sft_steps:
        return
    steps: int = settings.sft_steps
    print(f"{steps} supervised steps first: {job.description}", file=sys.stderr)
    trainer = supervised_trainer(job, settings, job.model)
    while trainer.completed_steps < steps and stop.requested is None:
        trainer.step()


def _source(config: Config, settings: Any, job: "Job") -> str:
    """What decides the traces, in words; a resumed collection must have the same."""
    resolved = {name: getattr(settings, name) for name in ("model", "shots", "sft_steps", "max_completion_length")}
    own = {name: getattr(config, name) for name in ("temperature", "samples_per_round", "max_samples", "seed")}
    stops = {"stop_strings": list(config.stop_strings)} if config.stop_strings else {}
    values = resolved | own | stops | {f"{name} files": digest for name, digest in job.inputs.items()}
    return "rejection sampling: " + ", ".join(f"{name}={value}" for name, value in values.items())


def _interrupted(config: Config, number: int, problems: int) -> dict[str, Any]:
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config) if field.name != "resume"}
    default = Config()
    words: list[str] = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value != getattr(default, name):
            words += [flag, *value] if isinstance(value, tuple) else [f"{flag}={value}"]
    command = shlex.join(["stemma", "collect", "--resume", *words])
    print(
        f"stopped by {signal.Signals(number).name} before all {problems} problems. Go on with: {command}",
        file=sys.stderr,
    )
    return {"status": "interrupted", "resume_with": command, "exit_status": 128 + number}


class _Progress:
    """A bar on a terminal, else one plain line per problem, on standard error."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.count, self.solved = total, done, 0
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="problem", dynamic_ncols=True)

    def show(self, trace: "Trace") -> None:
        self.count, self.solved = self.count + 1, self.solved + trace.solved
        if self.bar is not None:
            self.bar.set_postfix_str(f"solved={self.solved}", refresh=False)
            self.bar.update()
        else:
            outcome = "solved" if trace.solved else "given up"
            print(f"[{self.count}/{self.total}] {outcome} after {trace.samples} samples", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
