"""What the reproductions of RL methods share: DialLock, the policies they start from, a training run and its account.

Every run of a reproduction starts from the same policy, samples the same number of tokens (`Study.budget`; a run ends
with the step that reaches it) and is evaluated on the same held-out problems without prefixes, with the same random
numbers. Tokens of evaluation count for no method.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from transformers.utils import logging

from stemma.data import diallock
from stemma.decode.rollout import Generator, LocalGenerator
from stemma.models.tiny import tiny_model
from stemma.recipes._runs import Options, Runs, fingerprint, kept_folder
from stemma.rl.engine.hooks import Row, Run, ShuffledRows, sample
from stemma.rl.grpo import Config, Trainer
from stemma.train import sft
from stemma.train.checkpoint import load_weights
from stemma.train.fit import run_steps
from stemma.train.seeds import stream_seed

__all__ = ["QUICK_BASE", "BasePolicy", "Study", "Task", "hard_study", "plain_rows"]

Hooks = Callable[[Run], Mapping[str, Any]]
"""`hooks(run)`: what a method plugs into the trainer."""

_COMPARE_EVERY = 20  # optimiser steps between two comparisons of the shared with the plain forward


@dataclass(frozen=True, kw_only=True)
class BasePolicy:
    """A Llama made here and trained on noisy solutions of near problems: it turns and restates the dial without fault,
    and has a weak sense of direction. The less noise, the better its sense."""

    hidden_size: int = 64
    num_hidden_layers: int = 3
    noise: float = 0.5
    """Probability that a move of a demonstration is a random one."""
    max_distance: int = 4
    """Demonstrations are of problems up to this distance."""
    steps: int = 500
    learning_rate: float = 3e-3
    seed: int = 0

    def load(self, cache_dir: Path, say: Callable[[str], None]) -> Any:
        """The policy from its folder in `cache_dir`; trained and written there first where it is missing."""
        logging.disable_progress_bar()  # of loading and saving weights; runs have lines of their own
        name = f"diallock-{fingerprint(asdict(self))}"
        folder = kept_folder(cache_dir / name, lambda folder: self._train(say).save_pretrained(folder))
        model = self.make()
        load_weights(model, folder)
        return model

    def make(self) -> Any:
        """The model before any training."""
        return tiny_model(
            "llama",
            vocab_size=diallock.VOCAB_SIZE,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.64 * self.hidden_size**-0.5,  # with the usual 0.02 it needs twice the tokens
            eos_token_id=diallock.EOS_ID,
            pad_token_id=diallock.PAD_ID,
            seed=self.seed,
        )

    def _train(self, say: Callable[[str], None]) -> Any:
        near = diallock.problems("train", max_distance=self.max_distance)

        def batches(step: int) -> dict[str, torch.Tensor]:
            return diallock.packed_batch(near, Random(stream_seed(self.seed, "sft", step)), noise=self.noise)

        model = self.make()
        options = sft.Config(
            max_steps=self.steps, learning_rate=self.learning_rate, warmup_steps=min(20, self.steps // 5)
        )
        trainer = sft.Trainer(model, options, batches=batches)
        say(f"base policy: {sum(p.numel() for p in model.parameters()):,} parameters, {self.steps} supervised steps")

        def tell(metrics: Mapping[str, float]) -> None:
            if trainer.completed_steps % 100 == 0 or trainer.completed_steps == self.steps:
                say(f"base policy: step {trainer.completed_steps}, loss {metrics['loss']:.3f}")

        run_steps(trainer, on_step=tell)
        return model


QUICK_BASE = BasePolicy(hidden_size=32, num_hidden_layers=1, steps=5)


@dataclass(frozen=True, kw_only=True)
class Task:
    """DialLock problems of some distances; training and held-out problems are split by a hash of their text."""

    min_distance: int
    max_distance: int
    slack: int
    """Moves that a solution may take beyond the distance."""
    num_problems: int | None = None
    """Training problems, drawn by the seed of the run; None: all."""

    @property
    def max_completion_length(self) -> int:
        """Tokens that the longest right solution needs, and a little more."""
        return 6 * (self.max_distance + self.slack) + 8

    def training(self, seed: int) -> list[diallock.Problem]:
        """The training problems of a run."""
        return self._draw("train", self.num_problems, Random(stream_seed(seed, "problems")))

    def held_out(self, count: int) -> list[diallock.Problem]:
        """Test problems, the same for every run; fewer than `count` where there are not so many."""
        return self._draw("test", count, Random(0))

    def validation(self, count: int) -> list[diallock.Problem]:
        """Training problems, for methods whose training looks at evaluations."""
        return self._draw("train", count, Random(1))

    def _draw(self, split: Literal["train", "test"], count: int | None, rng: Random) -> list[diallock.Problem]:
        pool = diallock.problems(split, min_distance=self.min_distance, max_distance=self.max_distance)
        return pool if count is None else diallock.draw_problems(pool, min(count, len(pool)), rng)

    def reward(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        """The verifier as a reward function."""
        return [diallock.reward(p, c, slack=self.slack) for p, c in zip(prompt_ids, completion_ids, strict=True)]


def plain_rows(problems: Sequence[diallock.Problem]) -> list[dict[str, Any]]:
    """Rows of problems."""
    return [{"prompt_ids": diallock.encode(problem.prompt)} for problem in problems]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The setting that all methods of a reproduction share."""

    name: str
    base: BasePolicy
    task: Task
    budget: int
    """Tokens that each run samples for training."""
    trainer: Config
    evaluations: int = 8
    """Evaluations of a run after the first, at equal distances in sampled tokens."""
    eval_problems: int = 64
    eval_samples: int = 4
    """Completions per held-out problem, but for the last evaluation."""
    final_samples: int = 8
    """The same for the last one."""
    options: Options

    @property
    def runs(self) -> Runs:
        """Where this reproduction's finished runs are."""
        return Runs(self.options.folder / "runs")

    def for_options(self) -> "Study":
        """This study, or with `options.quick` one of seconds that only shows that everything runs."""
        if not self.options.quick:
            return self
        return replace(
            self,
            base=QUICK_BASE,
            task=replace(self.task, num_problems=4),
            budget=2000,
            trainer=replace(self.trainer, per_device_train_batch_size=2 * self.trainer.num_generations),
            evaluations=1,
            eval_problems=4,
            eval_samples=1,
            final_samples=1,
        )

    def about(self) -> dict[str, Any]:
        """The setting, as the report shows it."""
        task, base, config = self.task, self.base, self.trainer
        groups = config.per_device_train_batch_size // config.num_generations
        few = "" if task.num_problems is None else f", {task.num_problems} of them to train on"
        parameters = sum(parameter.numel() for parameter in base.make().parameters())
        return {
            "task": f"DialLock, distances {task.min_distance} to {task.max_distance}, slack {task.slack}{few}",
            "start": f"Llama of {parameters:,} parameters, {base.steps} supervised steps on solutions with noise "
            f"{base.noise} of distances up to {base.max_distance}",
            "sampled tokens per run": f"{self.budget:,}",
            "prompts × completions per step": f"{groups} × {config.num_generations}",
            "learning rate": config.learning_rate,
            "evaluation": f"{len(self.task.held_out(self.eval_problems))} held-out problems × {self.final_samples} "
            "completions at temperature 1",
            "threads": torch.get_num_threads(),
        }

    def config(self, **changes: Any) -> Config:
        """The trainer's options for this task, with changes."""
        fitting = {"max_completion_length": self.task.max_completion_length, "compare_every": _COMPARE_EVERY}
        return replace(self.trainer, **{**fitting, **changes})

    def model(self) -> Any:
        """The policy before training."""
        return self.base.load(self.options.cache_dir, self.runs.say)

    def generator(self) -> Generator:
        """What samples outside of training."""
        return LocalGenerator(eos_token_id=diallock.EOS_ID)

    def outcomes(self, model: Any, samples: int) -> dict[str, float]:
        """Shares of the outcomes (see `diallock.outcome`) of held-out problems without prefixes; "right" is pass@1."""
        problems = self.task.held_out(self.eval_problems)
        seeds = [stream_seed(0, "evaluate", index) for index in range(len(problems))]
        prompts = [row["prompt_ids"] for row in plain_rows(problems)]
        batch = sample(model, self.generator(), self.task.max_completion_length, prompts, samples, seeds)
        found = Counter(
            diallock.outcome(problems[group], ids, slack=self.task.slack)
            for group, ids in zip(batch.group_id.tolist(), batch.completions(), strict=True)
        )
        return {name: found[name] / len(batch) for name in get_args(diallock.Outcome)}

    def run(
        self,
        method: str,
        seed: int,
        *,
        settings: Mapping[str, Any] | None = None,
        rows: Callable[[], Sequence[Row]] | None = None,
        hooks: Hooks | None = None,
        prepare: Callable[[Any], Mapping[str, Any]] | None = None,
        tokens_before: int = 0,
        budget: int | None = None,
        validate: bool = False,
        **changes: Any,
    ) -> dict[str, Any]:
        """One training run, or what it left when it was finished before.

        Args:
            method: its name in reports.
            seed: of problems, their order and sampling; runs of different methods with one seed form a pair.
            settings: what else the result depends on, such as the method's options.
            rows: the training rows; those of the task's problems when None.
            hooks: the method; GRPO when None.
            prepare: changes the model before training, and returns what to keep about that.
            tokens_before: tokens sampled before training, at which the run's curve begins.
            budget: tokens sampled in training; the study's when None.
            validate: call `Trainer.evaluate` on training problems at every evaluation.
            changes: of the trainer's options.

        Returns:
            Plain data: `curve` (sampled, optimised, pass@1), `final` (pass@1, samples), totals and means per step.
        """
        config = self.config(seed=seed, **changes)
        budget = self.budget if budget is None else budget
        setting = {
            "base": asdict(self.base),
            "task": asdict(self.task),
            "trainer": asdict(config),
            "budget": budget,
            "evaluation": [self.evaluations, self.eval_problems, self.eval_samples, self.final_samples],
            "method": dict(settings or {}),
            "tokens_before": tokens_before,
        }

        def train() -> dict[str, Any]:
            model = self.model()
            kept = dict(prepare(model)) if prepare is not None else {}
            training = rows() if rows is not None else plain_rows(self.task.training(seed))
            arguments: dict[str, Any] = {"prompts": ShuffledRows(training, seed=stream_seed(seed, "prompts"))}
            run = Run(options=config, model=model, processing_class=diallock.tokenizer())
            arguments |= hooks(run) if hooks is not None else {}
            trainer = Trainer(
                model, config, reward_funcs=self.task.reward, processing_class=run.processing_class, **arguments
            )
            validation = plain_rows(self.task.validation(32)) if validate else []
            return kept | self._train(f"{self.name}: {method}, seed {seed}", trainer, tokens_before, budget, validation)

        return self.runs(method, seed, setting, train)

    def _train(
        self, name: str, trainer: Trainer, tokens_before: int, budget: int, validation: Sequence[Row]
    ) -> dict[str, Any]:
        steps: list[dict[str, float]] = []
        curve: list[dict[str, float]] = []
        sampled = optimised = 0.0
        while True:
            if sampled >= len(curve) * budget / self.evaluations:
                done = sampled >= budget
                outcomes = self.outcomes(trainer.model, self.final_samples if done else self.eval_samples)
                value = outcomes["right"]
                curve.append({"sampled": tokens_before + sampled, "optimised": optimised, "pass@1": value})
                reward = statistics.fmean(step["reward"] for step in steps[-20:]) if steps else float("nan")
                self.runs.say(f"{name}: {sampled / 1e3:.0f}k tokens, reward {reward:.3f}, pass@1 {value:.3f}")
                if done:
                    break
                if validation:
                    trainer.evaluate(validation, num_generations=4)
            steps.append(trainer.step())
            sampled += steps[-1]["tokens/sampled"]
            optimised += steps[-1]["tokens/optimised"]
        problems = len(self.task.held_out(self.eval_problems))
        final = {"pass@1": value, "samples": problems * self.final_samples, "outcomes": outcomes}
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        account = {"parameters": parameters, "steps": len(steps), "per_step": _per_step(steps), "totals": _sums(steps)}
        return {"curve": curve, "final": final, **account}


def hard_study(name: str, options: Options) -> Study:
    """Far problems without slack, which the policy solves about once in two hundred attempts."""
    return Study(
        name=name,
        base=BasePolicy(noise=0.65),
        task=Task(min_distance=14, max_distance=18, slack=0, num_problems=48),
        budget=350_000,
        trainer=Config(
            num_generations=8, per_device_train_batch_size=64, learning_rate=2e-4, lr_scheduler_type="constant"
        ),
        final_samples=10,
        options=options,
    ).for_options()


def _sums(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for step in steps for name in step if name.startswith("tokens/")}
    return {name: sum(step[name] for step in steps) for name in names}


def _per_step(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the steps; of comparisons the median, of errors the largest."""
    found: dict[str, float] = {}
    for name in {name: None for step in steps for name in step}:
        values = [step[name] for step in steps if name in step and step[name] == step[name]]
        if values:
            combine = max if name.endswith("_error") else statistics.median if "compare/" in name else statistics.fmean
            found[name] = combine(values)
    return found
