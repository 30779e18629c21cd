"""`stemma run prefix-rft`: hard problems with demonstrations, used by Prefix-RFT, by supervised steps, or not at all.

The paper (1.5B and 7B models on mathematics, one demonstration per problem): Prefix-RFT ends above RL alone, above
supervised fine-tuning, and above one after the other; training on the fifth of the prefix tokens with the highest
entropy beats training on all of them and on none. A later audit (arXiv 2604.23747) found that this literature's
supervised baselines were damaged by bugs, and that supervised training followed by RL is higher once they are mended.
Here both are measured by the same code.

No `--model`: which problems the start solves, and how often, is part of the setting; `stemma train --model` trains a
given policy by this method.
"""

from collections.abc import Mapping
from dataclasses import asdict
from random import Random
from typing import Any

import torch
from torch import Tensor

from stemma.data import diallock
from stemma.recipes._dial_study import Study, hard_study
from stemma.recipes._report import Report
from stemma.recipes._runs import Options
from stemma.rl import prefix_rft
from stemma.train import sft
from stemma.train.fit import run_steps
from stemma.train.seeds import stream_seed

__all__ = ["run"]

_SFT_STEPS, _SFT_BATCH, _SFT_RATE = 60, 16, 1e-3
_TOTAL_STEPS = 60  # optimiser steps of a run, about: the schedule of prefix lengths ends there
SFT, SFT_GRPO, RFT = "SFT", "SFT, then GRPO", "Prefix-RFT"
FROZEN, WHOLE = "Prefix-RFT, prefix frozen", "Prefix-RFT, whole prefix"


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    study = hard_study("prefix-rft", options)
    report = Report("prefix-rft", "Prefix-RFT on hard DialLock problems", study.about())
    report.about["demonstrations"] = "one shortest solution of each training problem"
    report.about["supervised steps"] = f"{_SFT_STEPS} of {_SFT_BATCH} demonstrations, learning rate {_SFT_RATE}"
    supervised = {"steps": _SFT_STEPS, "batch": _SFT_BATCH, "learning_rate": _SFT_RATE}
    for seed in range(options.seeds or (1 if options.quick else 5)):
        episodes = _demonstrations(study, seed)

        def prepare(model: Any, episodes: list[diallock.Episode] = episodes, seed: int = seed) -> Mapping[str, Any]:
            return _supervise(model, episodes, seed, steps=2 if options.quick else _SFT_STEPS)

        report.add(study.run("GRPO", seed))
        report.add(study.run(SFT, seed, settings=supervised, prepare=prepare, budget=0))
        report.add(study.run(SFT_GRPO, seed, settings=supervised, prepare=prepare))
        rows = [{"prompt_ids": e.prompt_ids, "demonstration_ids": e.completion_ids} for e in episodes]
        for method, quantile in ((RFT, 0.2), (FROZEN, 0.0), (WHOLE, 1.0)):
            report.add(_prefix_rft(study, method, seed, rows, prefix_rft.Config(entropy_quantile=quantile)))
    report.compare(RFT, "GRPO", "pass@1", "higher than RL alone")
    report.compare(RFT, SFT, "pass@1", "higher than supervised training")
    report.compare(RFT, SFT_GRPO, "pass@1", "higher than supervised training, then RL (disputed)")
    report.compare(RFT, FROZEN, "pass@1", "training on some prefix tokens beats none")
    report.compare(RFT, WHOLE, "pass@1", "training on the most uncertain fifth beats all")
    for method in (RFT, FROZEN, WHOLE):
        report.mean_of(method, "prefix_rft/reward_prefixed", "mean reward of completions with a prefix")
        report.mean_of(method, "prefix_rft/reward_free", "mean reward of completions without")
    for method in ("GRPO", SFT_GRPO, RFT, FROZEN, WHOLE):
        report.mean_of(method, "grad_norm", "mean gradient norm")
        report.mean_of(method, "completions/mean_length", "mean completion length", unit="tokens")
    return report.write(options.folder)


def _demonstrations(study: Study, seed: int) -> list[diallock.Episode]:
    rng = Random(stream_seed(seed, "demonstrations"))
    return [diallock.oracle_episode(problem, rng) for problem in study.task.training(seed)]


def _supervise(model: Any, episodes: list[diallock.Episode], seed: int, *, steps: int) -> dict[str, Any]:
    """Supervised steps on the demonstrations."""

    def batches(step: int) -> dict[str, Tensor]:
        rng = Random(stream_seed(seed, "sft", step))
        rows = [diallock.packed_sequence([episode]) for episode in rng.choices(episodes, k=_SFT_BATCH)]
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=diallock.PAD_ID),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=sft.IGNORED_LABEL),
        }

    config = sft.Config(max_steps=steps, learning_rate=_SFT_RATE, warmup_steps=min(10, steps // 2))
    trainer = sft.Trainer(model, config, batches=batches)
    losses: list[float] = []
    run_steps(trainer, on_step=lambda metrics: losses.append(metrics["loss"]))
    return {"supervised_loss": [losses[0], losses[-1]]}


def _prefix_rft(
    study: Study, method: str, seed: int, rows: list[dict[str, Any]], config: prefix_rft.Config
) -> dict[str, Any]:
    return study.run(
        method,
        seed,
        settings={"options": asdict(config)},
        rows=lambda: rows,
        hooks=lambda run: prefix_rft.hooks(config, run),
        max_steps=_TOTAL_STEPS,
    )
