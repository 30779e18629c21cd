"""`stemma run tempo`: tree credit against GRPO on the same samples' budget, and its values against the truth.

The paper (1.7B and 4B models on mathematics): TEMPO reaches GRPO's accuracy in 1.4 to 1.6 times fewer steps and ends
higher. Here: pairs of runs with one seed; a control whose temporal differences are dealt to the wrong rows of their
group; the tree's values beside Monte Carlo estimates of the same states.

No `--model`: which problems the start solves, and how often, is part of the setting; `stemma train --model` trains a
given policy by this method.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stemma.recipes._dial_study import BasePolicy, Study, Task, plain_rows
from stemma.recipes._report import Report
from stemma.recipes._runs import Options
from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import sample
from stemma.rl.grpo import Config as TrainerConfig
from stemma.rl.tempo import TreeCredit, ValueTree
from stemma.train.seeds import stream, stream_seed

__all__ = ["ShuffledTreeCredit", "run"]

_MIN_DESCENDANTS = 4  # of the nodes whose value is compared with continuations
_CONTINUATIONS = 64
_CONTROLS = 5  # seeds with the control
_NOISIER = ", noisier start"


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    trainer = TrainerConfig(
        num_generations=16, per_device_train_batch_size=64, learning_rate=2e-4, lr_scheduler_type="constant"
    )
    clean = Study(
        name="tempo",
        base=BasePolicy(noise=0.2, max_distance=3, steps=400),
        task=Task(min_distance=1, max_distance=9, slack=2, num_problems=1000),
        budget=140_000,
        trainer=trainer,
        eval_samples=2,
        options=options,
    )
    # It starts lower, and runs longer; its area is taken over the other's budget all the same.
    noisier = replace(clean, base=BasePolicy(noise=0.5), budget=200_000).for_options()
    study = clean.for_options()
    report = Report("tempo", "TEMPO against GRPO on DialLock", study.about(), study.budget)
    report.about["noisier start"] = noisier.about()["start"]
    for seed in range(options.seeds or (1 if options.quick else 8)):
        for each, name in ((study, ""), (noisier, _NOISIER)):
            for run in _runs(each, seed):
                report.add({**run, "method": f"{run['method']}{name}"})
    for name in ("", _NOISIER):
        tree, grpo, shuffled = f"TEMPO{name}", f"GRPO{name}", f"shuffled differences{name}"
        report.compare(tree, grpo, "area", "learns faster than GRPO (1.4–1.6 times)")
        report.compare(tree, grpo, "pass@1", "ends higher than GRPO")
        report.compare(tree, shuffled, "area", "the gain comes from crediting the right tokens")
    for name, words in (
        ("tree/branch_frac", "share of tokens with a temporal difference"),
        ("tree/mean_shared_depth", "tokens of a completion that another one shares"),
        ("tree/mean_descendants_at_branch", "completions through a branching prefix"),
    ):
        report.mean_of("TEMPO", name, words)
    for each, name in ((study, "start"), (noisier, f"start{_NOISIER}")):
        report.record(name, "share of outputs with wrong text", _wrong_text(each))
    problems = 2 if options.quick else 24
    settings = {"base": asdict(study.base), "problems": problems}
    oracle = study.runs("oracle", 0, settings, lambda: _oracle(study, problems))
    for name, words in (("values", "V(s)"), ("differences", "V(s) minus its parent's")):
        report.record(
            "TEMPO",
            f"correlation of {words} with {_CONTINUATIONS} continuations, nodes of ≥ {_MIN_DESCENDANTS} completions",
            oracle[name],
            repeats=oracle["nodes"],
        )
    return report.write(options.folder)


def _runs(study: Study, seed: int) -> Iterator[dict[str, Any]]:
    """The runs of one start and seed."""
    yield study.run("GRPO", seed)
    settings: dict[str, Any] = {"tree_td_coef": 1.0}
    yield study.run("TEMPO", seed, settings=settings, hooks=lambda _: {"credit": TreeCredit()})
    if seed < _CONTROLS:
        settings = {**settings, "shuffled": True}
        yield study.run(
            "shuffled differences",
            seed,
            settings=settings,
            hooks=lambda run: {"credit": ShuffledTreeCredit(run.options.seed)},
        )


def _wrong_text(study: Study) -> float:
    """Share of the start's outputs that fail because a state or target is restated wrongly."""
    samples = study.final_samples
    settings = {"base": asdict(study.base), "task": asdict(study.task), "samples": samples}
    return study.runs("outcomes", 0, settings, lambda: study.outcomes(study.model(), samples))["wrong text"]


class ShuffledTreeCredit:
    """Tree credit with the differences of every completion given to another one of its group: the control."""

    def __init__(self, seed: int) -> None:
        self._tree, self._group = TreeCredit(), GroupCredit()
        self._generator = stream(seed, "shuffled-differences")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """(N, T) float32."""
        base = self._group(batch)[:, None]
        differences = self._tree(batch) - base
        for group in batch.group_id.unique():
            rows = (batch.group_id == group).nonzero().squeeze(1)
            differences[rows] = differences[rows[torch.randperm(len(rows), generator=self._generator)]]
        return base + differences


def _oracle(study: Study, num_problems: int) -> dict[str, Any]:
    """Values of the base policy's trees of 16 completions beside success rates of continuations from their nodes."""
    model, generator, length = study.model(), study.generator(), study.task.max_completion_length
    rows = plain_rows(study.task.held_out(num_problems))
    prompts = [row["prompt_ids"] for row in rows]
    seeds = [stream_seed(0, "oracle", index) for index in range(len(rows))]
    batch = sample(model, generator, length, prompts, 16, seeds)
    completions, group = batch.completions(), batch.group_id.tolist()
    rewards = torch.tensor(study.task.reward([prompts[g] for g in group], completions), dtype=torch.float64)
    values = ValueTree.build(rewards, batch.completion_ids, batch.completion_mask, batch.group_id)
    tree = values.tree
    nodes = np.flatnonzero(tree.node_last - tree.node_first >= _MIN_DESCENDANTS)
    of_node = tree.order[tree.node_first[nodes]]  # one completion through each node
    # A node's depth counts the pseudo token before the completions, so it includes the node's own first token.
    begun = [completions[row][:depth] for row, depth in zip(of_node, tree.node_depth[nodes], strict=True)]
    asked = [prompts[group[row]] for row in of_node]
    node_seeds = [stream_seed(1, "oracle", index) for index in range(len(nodes))]
    continued = sample(
        model, generator, length, asked, _CONTINUATIONS, node_seeds, forced=[[ids] * _CONTINUATIONS for ids in begun]
    )
    of_sample = [asked[index] for index in continued.group_id.tolist()]
    outcome = np.array(study.task.reward(of_sample, continued.completions()), dtype=float)
    truth = dict(zip(nodes.tolist(), outcome.reshape(len(nodes), -1).mean(1).tolist(), strict=True))
    inner = [node for node in nodes.tolist() if tree.node_parent[node] >= 0]
    parent = {node: int(tree.node_parent[node]) for node in inner}
    estimated = values.value
    return {
        "nodes": len(inner),
        "values": _correlation([(estimated[node], truth[node]) for node in inner]),
        "differences": _correlation(
            [(estimated[node] - estimated[parent[node]], truth[node] - truth[parent[node]]) for node in inner]
        ),
    }


def _correlation(pairs: list[tuple[float, float]]) -> float:
    columns = np.array(pairs, dtype=float).reshape(-1, 2).T
    if columns.shape[1] < 2 or (columns.std(axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(columns)[0, 1])
