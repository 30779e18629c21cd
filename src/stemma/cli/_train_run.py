"""One run of `stemma train`: supervised steps, GRPO, final model, report; from the start or from a checkpoint."""

import json
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from transformers.utils import logging

from stemma.cli._flags import flat
from stemma.cli._train_jobs import make_job, supervised_trainer
from stemma.cli._train_options import Config, chosen, grpo_options, method_module
from stemma.data.traces import read_traces
from stemma.decode.rollout import Generator, LocalGenerator
from stemma.decode.server import ServerGenerator
from stemma.errors import InvalidDataError, MissingExtraError, NonFiniteError, StemmaError
from stemma.files import digest, write_json
from stemma.rl import grpo
from stemma.rl.engine.hooks import Run
from stemma.rl.engine.options import CreditName
from stemma.train import checkpoint, sft
from stemma.train.fit import run_steps
from stemma.train.report import write_report
from stemma.train.seeds import rng_state, seed_everything, set_rng_state, stream_seed
from stemma.train.sharding import full_model_state_dict
from stemma.train.tracking import Tracker, start_trackers

__all__ = ["Training"]

_INPUTS = "inputs.json"
"""Digests of the data set, the traces and the model that a run was begun with."""


class Training:
    """A run in `config.output_dir`, whose settings are complete.

    Args:
        config: the settings, without open defaults.
        accelerator: an `accelerate.Accelerator`.
        resume: start from the folder's last checkpoint, where there is one.
    """

    def __init__(self, config: Config, accelerator: Any, *, resume: bool) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, config.output_dir
        logging.disable_progress_bar()  # of loading and saving weights; the steps have their own
        seed_everything(config.seed)
        self.job = make_job(config)
        self.model = _with_adapter(self.job.model, config)
        try:
            self.hooks = self._hooks()
            self._check()
        except StemmaError:
            raise
        except ValueError as error:  # options that do not go together
            raise StemmaError(str(error)) from error
        self.sft_steps = config.sft_steps or 0
        self.total = self.sft_steps + config.max_steps
        self.checkpoint = checkpoint.latest(self.folder) if resume else None
        self._check_inputs()
        self.state: Mapping[str, Any] = {"phase": "sft", "global_step": 0}
        if self.checkpoint is not None:
            self.state = checkpoint.load_state(self.checkpoint)
        self.resume = resume

    def train(self) -> dict[str, Any]:
        """Take the steps that are left.

        Returns:
            The report, or, after a signal, where the run stands; "status" tells which.
        """
        done = self.state["global_step"]
        tracker = None
        if self.accelerator.is_main_process:
            resume_after = done if self.resume else None
            start_trackers(self.accelerator, self.folder, flat(self.config), resume_after=resume_after)
            tracker = Tracker(
                self.folder / "metrics.jsonl",
                total_steps=self.total,
                resume_after=resume_after,
                accelerator=self.accelerator,
            )
            tracker.note(f"{self._description()}{f'; continuing after step {done}' if done else ''}")
        try:
            with checkpoint.StopSignal() as stop:
                finished = self._supervised(tracker, stop) and self._reinforced(tracker, stop)
            weights = full_model_state_dict(self.model)
        except NonFiniteError as error:
            raise StemmaError(f"training stopped: {error}. Checkpoints before it are in '{self.folder}'") from error
        finally:
            if tracker is not None:
                tracker.close()
            self.accelerator.end_training()
        return self._finish(weights) if finished else self._interrupted(stop.requested or signal.SIGTERM)

    def _supervised(self, tracker: Tracker | None, stop: checkpoint.StopSignal) -> bool:
        if self.state["phase"] == "grpo" or not self.sft_steps:
            return True
        trainer = supervised_trainer(self.job, self.config, self.model, self.accelerator)
        self._restore(trainer)
        finished = self._run(trainer, "sft", 0, tracker, stop)
        if finished and self.accelerator.is_main_process:
            # The policy before GRPO: the reference of a resumed run, and what its result is compared with.
            checkpoint.save_model(self.folder / "sft", model=self.model, processing_class=self.job.processing_class)
        self.accelerator.wait_for_everyone()
        return finished

    def _reinforced(self, tracker: Tracker | None, stop: checkpoint.StopSignal) -> bool:
        resumed = self.state["phase"] == "grpo"
        if resumed and self.sft_steps:
            checkpoint.load_weights(self.model, self.folder / "sft")  # the trainer copies its reference from here
        trainer = grpo.Trainer(
            self.model,
            grpo_options(self.config),
            processing_class=self.job.processing_class,
            accelerator=self.accelerator,
            **self.hooks,
        )
        if resumed:
            self._restore(trainer)
        rows = self.job.eval_rows
        evaluate = (lambda: trainer.evaluate(rows)) if rows else None
        return self._run(trainer, "grpo", self.sft_steps, tracker, stop, evaluate)

    def _restore(self, trainer: Any) -> None:
        if self.checkpoint is not None:
            checkpoint.load_weights(self.model, self.checkpoint)
            trainer.load_state_dict(self.state["trainer"])
            set_rng_state(self.state["rng"])

    def _run(
        self,
        trainer: sft.Trainer | grpo.Trainer,
        phase: str,
        steps_before: int,
        tracker: Tracker | None,
        stop: checkpoint.StopSignal,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
    ) -> bool:
        def save(metrics: Mapping[str, float]) -> None:
            self.last_step = steps_before + trainer.completed_steps
            progress = {"phase": phase, "step": trainer.completed_steps, "global_step": self.last_step}
            state = {**progress, "trainer": trainer.state_dict(), "rng": rng_state()}  # gathered from all processes
            weights = full_model_state_dict(self.model)
            if self.accelerator.is_main_process:
                checkpoint.save(
                    self.folder,
                    self.last_step,
                    model=self.model,
                    processing_class=self.job.processing_class,
                    state=state,
                    progress={**progress, "metrics": dict(metrics)},
                    save_total_limit=self.config.save_total_limit,
                    weights=weights,
                )
            self.accelerator.wait_for_everyone()

        return run_steps(
            trainer,
            phase=phase,
            steps_before=steps_before,
            tracker=tracker,
            save=save,
            save_steps=self.config.save_steps,
            stop=stop,
            evaluate=evaluate,
            eval_steps=self.config.eval_steps,
        )

    def _hooks(self) -> dict[str, Any]:
        """The arguments of the trainer that the task, the method and the credit decide.

        Raises:
            ValueError: a method and a credit that do not go together, or options that the method refuses.
            InvalidDataError: traces or demonstrations that cannot be used.
        """
        config, job = self.config, self.job
        traces = read_traces(config.traces, tokenizer=job.processing_class) if config.traces else ()
        run = Run(
            options=grpo_options(config),
            model=self.model,
            processing_class=job.processing_class,
            accelerator=self.accelerator,
            reward=job.reward,
            rows=job.rows or job.prompts(0, 64),
            traces=traces,
            is_boundary=job.is_boundary,
        )
        found = {"prompts": job.prompts, "reward_funcs": job.reward, "generator": self._generator()}
        return found | _method_hooks(config, run)

    def _check(self) -> None:
        """Refuse before the supervised steps what GRPO would refuse after them.

        Raises:
            ValueError: see `grpo.check`.
            InvalidBatchError: a prompt that leaves no room for its completions.
        """
        config = self.config
        grpo.check(self.model, grpo_options(config), generator=self.hooks["generator"], accelerator=self.accelerator)
        self.job.check(config.max_completion_length or 1)

    def _check_inputs(self) -> None:
        """Keep the digests of what the run reads, or compare with those that it began with.

        Raises:
            InvalidDataError: the data or the model have changed since.
        """
        inputs = dict(self.job.inputs)
        if self.config.traces is not None:
            inputs["traces"] = digest(self.config.traces)
        path = self.folder / _INPUTS
        if self.checkpoint is None:  # nothing was computed from them yet
            if self.accelerator.is_main_process:
                write_json(path, inputs)
            return
        try:
            kept = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise InvalidDataError(
                f"cannot read {path}, the digests of what the run was begun with: {error}"
            ) from error
        for name, value in inputs.items():
            if kept.get(name) != value:
                raise InvalidDataError(
                    f"--{name} {getattr(self.config, name)} has changed since the run in '{self.folder}' began (its "
                    f"files have another digest); put them back, or begin a new run with another --output-dir"
                )

    def _generator(self) -> Generator:
        """What samples: the model in this process, or a server."""
        config, tokenizer = self.config, self.job.processing_class
        options: dict[str, Any] = {
            "eos_token_id": grpo.end_token_ids(self.model, tokenizer),
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "stop_strings": list(config.stop_strings) or None,
        }
        server = config.server
        if server.url is None:
            return LocalGenerator(tokenizer=tokenizer if config.stop_strings else None, **options)
        return ServerGenerator(
            server.url,
            dialect=server.dialect,
            weights="sync" if server.weights_dir else "fixed",
            weights_dir=server.weights_dir,
            processed_logprobs=server.processed_logprobs,
            **options,
        )

    def _description(self) -> str:
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return (
            f"{self.job.description}; {type(self.model).__name__}, {trainable:,} trainable parameters; "
            f"{self.sft_steps} supervised and {self.config.max_steps} GRPO steps on {self.accelerator.device}"
        )

    def _finish(self, weights: dict[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = {"command": "train", "status": "finished", "output_dir": str(self.folder)}
        if not self.accelerator.is_main_process:
            return result
        final = checkpoint.save_model(
            self.folder / "model", model=self.model, processing_class=self.job.processing_class, weights=weights
        )
        config = self.config
        about = {
            "task": self.job.description,
            "model": config.model or "Llama made for this run",
            "trainable parameters": f"{sum(p.numel() for p in self.model.parameters() if p.requires_grad):,}",
            "prompts × completions per step": f"{self._groups()} × {config.num_generations}",
            "method, credit": f"{config.method}, {config.credit}",
            "loss": config.loss_type,
            "learning rate": f"{config.learning_rate} ({config.lr_scheduler_type})",
            "forward": "shared prefixes" if config.shared_prefix else "plain",
            "processes": self.accelerator.num_processes,
            "seed": config.seed,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.accelerator.device}",
            "torch": torch.__version__,
        }
        report = write_report(self.folder, title=f"stemma train: {self.job.description}", about=about)
        reward, comparison = report["reward"], report["comparison"]
        print(f"reward {reward['first']:.3f} -> {reward['last']:.3f} (training prompts)")
        if report["evaluation"]:
            first, last = (report["evaluation"][key]["eval/reward"] for key in ("first", "last"))
            print(f"reward {first:.3f} -> {last:.3f} (held-out prompts)")
        if report["groups_of_equal_reward"] == 1:
            print("the completions of every group had equal rewards, which give no gradient")
        saved = report["tokens"]["saved_ratio"]
        if saved > 1:
            print(f"updates encoded {saved:.2f}x fewer tokens than without sharing")
        else:
            print("updates shared nothing: the plain forward was taken")
        if comparison:
            print(f"first rows of a step took {comparison['time_ratio_median']:.2f}x less time than plain (median)")
        print(f"report: {self.folder / 'report.md'}   plot: {self.folder / 'plot.png'}   model: {final}")
        return {**result, "model": str(final), **report}

    def _groups(self) -> int:
        size = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        return size * self.accelerator.num_processes // self.config.num_generations

    def _interrupted(self, number: int) -> dict[str, Any]:
        command = shlex.join(["stemma", "train", "--resume", "--output-dir", str(self.folder)])
        if self.accelerator.is_main_process:
            print(
                f"stopped by {signal.Signals(number).name} after step {self.last_step} of {self.total}; a checkpoint "
                f"is written. Continue with: {command}",
                file=sys.stderr,
            )
        return {
            "command": "train",
            "status": "interrupted",
            "output_dir": str(self.folder),
            "global_step": self.last_step,
            "resume_with": command,
            "exit_status": 128 + number,
        }


def _method_hooks(config: Config, run: Run) -> dict[str, Any]:
    """What the chosen credit and method give to the trainer; see `stemma.rl.engine.hooks`.

    Raises:
        ValueError: --credit names a method that gives more than a credit, or both give one.
    """
    options, found = chosen(config), {}
    if config.credit not in get_args(CreditName):
        found = method_module(config.credit).hooks(options[config.credit], run)
        if set(found) != {"credit"}:
            raise ValueError(
                f"--credit {config.credit} is more than a credit, it gives {', '.join(sorted(found))}: choose it with "
                f"--method {config.credit}"
            )
        run = replace(run, credit=found["credit"])
    if config.method == "grpo":
        return found
    own = method_module(config.method).hooks(options[config.method], run)
    built_on = (own.get("credit"), getattr(own.get("credit"), "credit", None))
    if "credit" in own and run.credit is not None and not any(each is run.credit for each in built_on):
        raise ValueError(f"--method {config.method} and --credit {config.credit} both give a credit; choose one")
    return {**found, **own}


def _with_adapter(model: Any, config: Config) -> Any:
    if not config.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "--use-peft") from error
    lora = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(stream_seed(config.seed, "adapter"))
    return get_peft_model(model, lora)
