"""`stemma run pppo`: does the beginning of an output decide, and is it enough to train on it?

The paper (4B and 8B reasoning models): outputs that begin like a correct one succeed more often and those that begin
like a wrong one less often than others; training on the first 15 to 35 % of the tokens, judged by several
continuations, ends above GRPO and DAPO with equally many sampled outputs and a quarter of the optimised tokens. Here:
GRPO draws groups as large as outputs and continuations together. It is compared at equally many sampled tokens, and
where it has optimised as many tokens as PPPO. The continuations of a beginning say how much of the outcome it decides.

No `--model`: which problems the start solves, and how often, is part of the setting; `stemma train --model` trains a
given policy by this method.
"""

import math
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import numpy as np
import torch

from stemma.data import diallock
from stemma.recipes._dial_study import BasePolicy, Study, Task, plain_rows
from stemma.recipes._report import Report
from stemma.recipes._runs import Options
from stemma.rl import pppo
from stemma.rl.engine.hooks import sample
from stemma.rl.grpo import Config as TrainerConfig
from stemma.train.seeds import stream_seed

__all__ = ["run", "variances"]

_OUTPUTS, _CONTINUATIONS, _PROMPTS = 8, 3, 8
_LEARNING_RATE = 1e-4  # GRPO learns faster with 2e-4, with which PPPO loses again what it has gained
PPPO, FIXED = "PPPO", "PPPO, 35 % from the start"
_FRACTIONS = (0.15, 0.3)


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    study = Study(
        name="pppo",
        base=BasePolicy(noise=0.2, max_distance=3, steps=400),
        task=Task(min_distance=1, max_distance=9, slack=2, num_problems=1000),
        budget=280_000,
        trainer=TrainerConfig(
            num_generations=_OUTPUTS,
            per_device_train_batch_size=_PROMPTS * _OUTPUTS,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            epsilon_high=0.28,
        ),
        evaluations=6,
        options=options,
    ).for_options()
    continuations = 1 if options.quick else _CONTINUATIONS
    group = _OUTPUTS * (1 + continuations)
    grpo = f"GRPO, groups of {group}"
    report = Report("pppo", "PPPO against GRPO on DialLock", study.about(), study.budget)
    report.about["learning rate"] = f"GRPO {study.trainer.learning_rate}, PPPO {_LEARNING_RATE}: the better of both"
    report.about["PPPO"] = f"{_OUTPUTS} outputs per prompt, {continuations} continuations of each"
    prompts = study.trainer.per_device_train_batch_size // _OUTPUTS
    for seed in range(options.seeds or (1 if options.quick else 5)):
        report.add(study.run(grpo, seed, num_generations=group, per_device_train_batch_size=group * prompts))
        for method, config in (
            (PPPO, pppo.Config(num_continuations=continuations)),
            (FIXED, pppo.Config(num_continuations=continuations, eta_start=0.35)),
        ):
            report.add(_pppo(study, method, seed, config))
    report.compare(PPPO, grpo, "pass@1", "higher than GRPO at equally many sampled tokens")
    _at_equal_optimised_tokens(report, grpo)
    _above_the_start(report)
    report.compare(PPPO, FIXED, "pass@1", "a growing beginning beats a long one from the start")
    report.mean_of(PPPO, "pppo/eta", "mean retained share (eta)")
    _failures(study, report)
    _lock_in(study, report)
    _variance(study, report)
    return report.write(options.folder)


def _pppo(study: Study, method: str, seed: int, config: pppo.Config) -> dict[str, Any]:
    return study.run(
        method,
        seed,
        settings=asdict(config),
        hooks=lambda run: pppo.hooks(config, run),
        validate=True,
        learning_rate=_LEARNING_RATE,
    )


def _failures(study: Study, report: Report) -> None:
    """What goes wrong before and after: the ends of outputs are what PPPO does not train."""
    samples = study.final_samples
    settings = {"base": asdict(study.base), "task": asdict(study.task), "samples": samples}
    start = study.runs("outcomes", 0, settings, lambda: study.outcomes(study.model(), samples))
    after = {method: [run["final"]["outcomes"] for run in runs] for method, runs in report.runs.items()}
    for name in get_args(diallock.Outcome):
        report.record("start", f"share of outputs: {name}", start[name])
        for method, outcomes in after.items():
            report.mean(method, f"share of outputs: {name}", [each[name] for each in outcomes])


def _at_equal_optimised_tokens(report: Report, grpo: str) -> None:
    """PPPO's end against the point of GRPO's curve with as many optimised tokens."""
    then = []
    for own, other in zip(report.runs[PPPO], report.runs[grpo], strict=True):
        curve, tokens = other["curve"], own["curve"][-1]["optimised"]
        then.append(np.interp(tokens, [p["optimised"] for p in curve], [p["pass@1"] for p in curve]).item())
    words = f"pass@1, {PPPO} − {grpo}, where it has optimised as many tokens"
    report.claim(PPPO, words, report.finals(PPPO), "needs fewer optimised tokens", than=(grpo, then))


def _above_the_start(report: Report) -> None:
    start = [run["curve"][0]["pass@1"] for run in report.runs[PPPO]]
    claim = "training on the beginnings alone improves the whole"
    report.claim(PPPO, "pass@1, end − start", report.finals(PPPO), claim, than=("start", start))


def _lock_in(study: Study, report: Report) -> None:
    problems = 4 if study.options.quick else 48
    settings = {"base": asdict(study.base), "task": asdict(study.task), "problems": problems, "of": "each problem"}

    def measure() -> dict[str, Any]:
        generate = partial(sample, study.model(), study.generator(), study.task.max_completion_length)
        rows, decode = plain_rows(study.task.held_out(problems)), diallock.tokenizer().decode
        found = pppo.beginning_lock_in(generate, rows, study.task.reward, decode, fractions=_FRACTIONS)
        return {"lock_in": [asdict(each) for each in found]}

    for each in study.runs("lock-in", 0, settings, measure)["lock_in"]:
        share = f"first {each['fraction']:.0%}"
        for name, words, error in zip(
            ("correct", "after_correct", "after_wrong"),
            ("P(correct)", "P(correct) given the {} of a correct output", "P(correct) given the {} of a wrong output"),
            each["standard_errors"],
            strict=True,
        ):
            if name != "correct" or each["fraction"] == _FRACTIONS[0]:
                words = words.format(share)
                report.record("start", words, each[name], error=error, repeats=each["num_problems"])
        known = [chances for chances in each["of_problems"] if all(map(math.isfinite, chances))]
        raised, lowered = [good - base for base, good, _ in known], [base - bad for base, _, bad in known]
        words = f"P(correct), with the {share} of a correct output − without, problems"
        report.claim("start", words, raised, "a good beginning raises the chance")
        words = f"P(correct), without − with the {share} of a wrong output, problems"
        report.claim("start", words, lowered, "a bad beginning lowers it")


def _variance(study: Study, report: Report) -> None:
    """How steady the reward of a beginning becomes with more continuations, and what it decides of the outcome."""
    problems, beginnings, samples = (2, 2, 16) if study.options.quick else (24, 8, 64)
    settings = {"base": asdict(study.base), "task": asdict(study.task), "size": [problems, beginnings, samples]}

    def measure() -> dict[str, Any]:
        generate = partial(sample, study.model(), study.generator(), study.task.max_completion_length)
        prompts = [row["prompt_ids"] for row in plain_rows(study.task.held_out(problems))]
        outputs = generate(prompts, beginnings, [stream_seed(0, "variance", i) for i in range(problems)])
        kept = pppo.retained_lengths(outputs.completion_mask.sum(-1), _FRACTIONS[0])
        forced = [[ids[:length]] * samples for ids, length in zip(outputs.completions(), kept.tolist(), strict=True)]
        asked = [prompts[group] for group in outputs.group_id.tolist()]
        continued = generate(asked, samples, [stream_seed(1, "variance", i) for i in range(len(asked))], forced=forced)
        of_sample = [asked[group] for group in continued.group_id.tolist()]
        reward = torch.tensor(study.task.reward(of_sample, continued.completions()), dtype=torch.float64)
        return variances(reward.reshape(problems, beginnings, samples).numpy())

    found = study.runs("variance", 0, settings, measure)
    count = problems * beginnings
    report.record(
        "start",
        f"share of the outcome's variance within a problem that its first {_FRACTIONS[0]:.0%} decide",
        found["decided"],
        repeats=count,
    )
    for rewards, ratio in found["shrinkage"].items():
        words = f"variance of the mean of {rewards} rewards of a beginning × {rewards} / variance of one"
        report.record("start", words, ratio, repeats=count)


def variances(reward_PBS: "np.ndarray[Any, Any]") -> dict[str, Any]:
    """Of rewards (problems, beginnings, samples): the share of the variance between the beginnings of a problem, and
    for means of 2, 4 and 8 samples their variance within a beginning times that number over that of one sample (1 when
    a mean of n rewards is n times as steady)."""
    within = reward_PBS.var(axis=2, ddof=1)
    samples = reward_PBS.shape[2]
    # The variance of the means holds 1/samples of the variance within.
    between = np.maximum(reward_PBS.mean(axis=2).var(axis=1, ddof=1) - within.mean(axis=1) / samples, 0.0).mean()
    total = between + within.mean()
    shrinkage = {}
    for size in (2, 4, 8):
        means = reward_PBS.reshape(*reward_PBS.shape[:2], samples // size, size).mean(axis=3)
        variance = means.var(axis=2, ddof=1).mean()
        shrinkage[str(size)] = float(variance * size / within.mean()) if within.mean() else float("nan")
    return {"decided": float(between / total) if total else float("nan"), "shrinkage": shrinkage}
