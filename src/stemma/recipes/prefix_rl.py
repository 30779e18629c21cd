"""`stemma run prefix-rl`: hard problems with and without prefixes of solutions that another policy found.

The paper (8B and 4B models, problems with no success in 512 samples): training on prefixed problems raises success on
the same problems without prefixes ("back-generalisation"), with half the operations of the alternatives, rejection
sampling counted. Here: problems that the start solves about once in two hundred attempts; traces by rejection sampling
with a policy that saw better demonstrations. Controls: prefixes of other problems' traces; GRPO with the tokens of the
rejection sampling on top of its own.

No `--model`: which problems the start solves, and how often, is part of the setting; `stemma train --model` trains a
given policy by this method.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

from stemma.data import diallock
from stemma.data.traces import Trace, totals
from stemma.recipes._dial_study import BasePolicy, Study, hard_study, plain_rows
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, fingerprint
from stemma.recipes._statistics import binomial, mean_and_error
from stemma.rl import prefix_rl
from stemma.rl.engine.collect import collect_traces
from stemma.train.seeds import stream_seed

__all__ = ["run"]

ONLY, MIXED = "PrefixRL, prefixed only", "PrefixRL, 3 prefixed : 1 plain"
LONGER, MISMATCHED = "GRPO with the collection's tokens", "prefixes of other problems"


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    study = hard_study("prefix-rl", options)
    source = study.base if options.quick else replace(study.base, noise=0.5)
    report = Report("prefix-rl", "PrefixRL against GRPO on hard DialLock problems", study.about())
    report.about["traces"] = f"rejection sampling with the policy of noise {source.noise}"
    operations: dict[str, list[float]] = {}
    collections: list[dict[str, float]] = []
    for seed in range(options.seeds or (1 if options.quick else 5)):
        traces = _traces(study, source, seed)
        cost = totals(traces)
        collected = int(cost["tokens"])
        for method, config, given, budget in (
            ("GRPO", None, traces, study.budget),
            (LONGER, None, traces, study.budget + collected),
            (ONLY, prefix_rl.Config(include_unprefixed=False), traces, study.budget),
            (MIXED, prefix_rl.Config(), traces, study.budget),
            (MISMATCHED, prefix_rl.Config(include_unprefixed=False), _mismatched(traces), study.budget // 8),
        ):
            run = _run(study, method, seed, config, given, budget, source)
            report.add(run)
            own = 2 * run["totals"]["tokens/rollout_encoded"] + 6 * run["totals"]["tokens/forwarded"]
            before = cost["flops"] if config is not None else 0.0
            operations.setdefault(method, []).append(before + own * run["parameters"])
        collections.append(cost)
    for name in ("tokens", "samples", "solved"):
        report.mean("rejection sampling", f"{name} of a collection", [cost[name] for cost in collections])
    claim = "prefixes help at equal training samples"
    report.compare(ONLY, "GRPO", "pass@1", claim)
    report.compare(MIXED, "GRPO", "pass@1", claim)
    report.compare(ONLY, LONGER, "pass@1", "they help when rejection sampling is counted too")
    report.compare(MIXED, LONGER, "pass@1", "they help when rejection sampling is counted too")
    _back_generalisation(study, report)
    del operations[MISMATCHED]  # a shorter run
    for method, values in operations.items():
        words = "10¹² operations (2ND sampling, rejected ones included; 6ND updates)"
        report.mean(method, words, [value / 1e12 for value in values])
        report.mean_of(method, "reward", "mean training reward")
    return report.write(options.folder)


def _run(
    study: Study,
    method: str,
    seed: int,
    config: prefix_rl.Config | None,
    traces: Sequence[Trace],
    budget: int,
    source: BasePolicy,
) -> dict[str, Any]:
    if config is None:
        return study.run(method, seed, budget=budget)
    return study.run(
        method,
        seed,
        budget=budget,
        settings={"options": asdict(config), "source": asdict(source)},
        hooks=lambda run: prefix_rl.hooks(config, replace(run, traces=traces)),
        tokens_before=int(totals(traces)["tokens"]),
        **config.defaults,
    )


def _traces(study: Study, source: BasePolicy, seed: int) -> list[Trace]:
    """One solution of each training problem of the seed, sampled by the source."""
    settings = {"source": asdict(source), "task": asdict(study.task), "seed": seed}
    quick = study.options.quick
    path = study.options.folder / "runs" / f"traces-{seed}-{fingerprint(settings)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = plain_rows(study.task.training(seed))
    if quick:  # a policy of a few steps solves nothing
        episodes = [diallock.oracle_episode(problem, Random(seed)) for problem in study.task.training(seed)]
        return [Trace(prompt_ids=e.prompt_ids, trace_ids=e.completion_ids, verified=True) for e in episodes]
    study.runs.say(f"{study.name}: traces of {len(rows)} problems, seed {seed}")
    return collect_traces(
        source.load(study.options.cache_dir, study.runs.say),
        rows,
        study.task.reward,
        generator=study.generator(),
        processing_class=diallock.tokenizer(),
        max_completion_length=study.task.max_completion_length,
        samples_per_round=32,
        seed=stream_seed(seed, "traces"),
        path=path,
    )


def _mismatched(traces: Sequence[Trace]) -> list[Trace]:
    """Every problem with the trace of the next one."""
    solved = [trace for trace in traces if trace.solved]
    return [
        replace(trace, trace_ids=other.trace_ids, tokens=0, flops=0.0)
        for trace, other in zip(solved, [*solved[1:], *solved[:1]], strict=True)
    ]


def _back_generalisation(study: Study, report: Report) -> None:
    """Is success without prefixes, after training on prefixed problems alone, above that of the start?"""
    samples = 2 if study.options.quick else 40
    settings = {"base": asdict(study.base), "task": asdict(study.task), "samples": samples}
    start = study.runs("start", 0, settings, lambda: study.outcomes(study.model(), samples))["right"]
    report.record("start", "pass@1", start, repeats=samples * len(study.task.held_out(study.eval_problems)))
    runs = report.runs[ONLY]
    trials = sum(run["final"]["samples"] for run in runs)
    successes = sum(round(run["final"]["pass@1"] * run["final"]["samples"]) for run in runs)
    report.record(
        ONLY,
        "pass@1 without prefix, samples of all seeds; claimed above that of the start",
        successes / trials,
        error=mean_and_error(report.finals(ONLY))[1],
        repeats=trials,
        baseline="start",
        baseline_value=start,
        claim="training on prefixed problems alone raises success without prefixes",
        threshold=start,
        test="binomial",
        p_value=binomial(successes, trials, start),
    )
