"""Reproductions run, resume and count right; the slow ones assert that the methods learn what they should."""

import json
import math
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from stemma.data import diallock
from stemma.data.traces import Trace
from stemma.recipes._dial_study import QUICK_BASE, BasePolicy, Study, Task, hard_study, plain_rows
from stemma.recipes._runs import Options
from stemma.recipes._statistics import binomial
from stemma.recipes.pppo import variances
from stemma.recipes.tempo import ShuffledTreeCredit
from stemma.rl import pppo, prefix_rl, tempo
from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import sample
from stemma.rl.grpo import Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

METHODS = ("tempo", "prefix-rft", "prefix-rl", "pppo")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def small_study(tmp_path, cache, **changes):
    """A study of seconds."""
    options = Options(output_dir=tmp_path, cache_dir=cache, quick=True)
    trainer = Config(num_generations=4, learning_rate=1e-3)
    task = Task(min_distance=1, max_distance=3, slack=2)
    study = Study(name="test", base=QUICK_BASE, task=task, budget=1, trainer=trainer, options=options)
    return replace(study.for_options(), **changes)


@pytest.mark.parametrize("method", METHODS)
def test_a_reproduction_runs_and_resumes(method, tmp_path, cache, capsys):
    module = import_module(f"stemma.recipes.{method.replace('-', '_')}")
    options = Options(output_dir=tmp_path, cache_dir=cache, quick=True)
    result = module.run(options)
    capsys.readouterr()
    assert {path.suffix for path in options.folder.iterdir() if path.is_file()} == {".json", ".md", ".png"}
    assert json.loads((options.folder / f"{method}.json").read_text()) == json.loads(json.dumps(result))
    for row in result["measurements"]:
        if row["metric"] in ("pass@1", "sampled", "optimised", "encoded"):
            assert math.isfinite(row["value"]), row
    claims = [row for row in result["measurements"] if row["claim"]]
    assert claims
    assert all(row["test"] for row in claims)

    kept = {path.name: path.stat().st_mtime_ns for path in (options.folder / "runs").glob("*.json")}
    removed = sorted(kept)[0]  # as if the process had been killed before this run was done
    (options.folder / "runs" / removed).unlink()
    again = module.run(options)
    said = capsys.readouterr().err
    found = {line.rpartition(" ")[2] for line in said.splitlines() if "finished before" in line}
    assert {*kept} - {removed} <= found
    untouched = {path.name: path.stat().st_mtime_ns for path in (options.folder / "runs").glob("*.json")}
    assert {name for name in kept if untouched[name] != kept[name]} == {removed}
    timeless = [row for row in result["measurements"] if row["unit"] != "s"]
    assert [row for row in again["measurements"] if row["unit"] != "s"] == timeless


def test_the_base_policy_is_made_once(tmp_path):
    lines = []
    first = QUICK_BASE.load(tmp_path, lines.append)
    said = len(lines)
    assert said
    second = QUICK_BASE.load(tmp_path, lines.append)
    assert len(lines) == said
    for one, two in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary is left
    other = replace(QUICK_BASE, noise=0.1).load(tmp_path, lines.append)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(next(iter(first.state_dict().values())), next(iter(other.state_dict().values())))


def test_training_and_held_out_problems_are_disjoint_and_fit():
    task = Task(min_distance=14, max_distance=18, slack=2, num_problems=10)
    training, held_out = task.training(0), task.held_out(64)
    assert len(training) == 10
    assert training == task.training(0) != task.training(1)
    assert not {*task.training(0), *task.training(1), *task.validation(32)} & {*held_out}
    assert len({problem.prompt for problem in held_out}) == len(held_out)
    longest = diallock.oracle_episode(diallock.Problem(0, 99), Random(0))
    assert len(longest.completion_ids) + 6 * task.slack <= task.max_completion_length
    assert task.reward([longest.prompt_ids], [longest.completion_ids]) == [1.0]
    assert task.reward([longest.prompt_ids], [longest.completion_ids[:-1]]) == [0.0]


def test_runs_sample_the_budget_and_say_what_they_did(tmp_path, cache):
    study = small_study(tmp_path, cache, budget=1500, evaluations=3)
    run = study.run("GRPO", 0, tokens_before=70)
    sampled = [point["sampled"] for point in run["curve"]]
    assert sampled[0] == 70
    assert len(sampled) == 4
    assert 1500 <= sampled[-1] - 70 == run["totals"]["tokens/sampled"] < 1500 + 8 * study.task.max_completion_length
    assert run["totals"]["tokens/optimised"] == run["curve"][-1]["optimised"] == sampled[-1] - 70
    assert run["per_step"]["tokens/sampled"] * run["steps"] == pytest.approx(sampled[-1] - 70)
    assert run["final"]["pass@1"] == run["curve"][-1]["pass@1"]
    assert run["settings"]["trainer"]["max_completion_length"] == study.task.max_completion_length


def test_what_the_result_depends_on_makes_another_run(tmp_path, cache):
    study = small_study(tmp_path, cache, budget=1)  # one step each
    study.run("GRPO", 0)
    for changed in (
        lambda: study.run("GRPO", 0, settings={"option": 1}),
        lambda: study.run("GRPO", 0, learning_rate=1e-5),
        lambda: replace(study, task=replace(study.task, slack=1)).run("GRPO", 0),
        lambda: replace(study, base=replace(study.base, seed=1)).run("GRPO", 0),
        lambda: study.run("GRPO", 1),
    ):
        before = len(list((study.options.folder / "runs").iterdir()))
        changed()
        assert len(list((study.options.folder / "runs").iterdir())) == before + 1


def test_preparation_changes_the_policy_before_training(tmp_path, cache):
    study = small_study(tmp_path, cache)

    def prepare(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return {"prepared": 1}

    run = study.run("SFT", 0, prepare=prepare, budget=0)
    assert run["prepared"] == 1
    assert run["steps"] == 0
    assert len(run["curve"]) == 1


def test_shuffled_differences_keep_their_sum_and_leave_their_rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, (12, 6), generator=generator)
    batch = RolloutBatch(
        prompt_ids=[[1], [2]],
        group_id=torch.arange(2).repeat_interleave(6),
        completion_ids=ids,
        completion_mask=torch.ones(12, 6, dtype=torch.bool),
        truncated=torch.zeros(12, dtype=torch.bool),
        forced_len=torch.zeros(12, dtype=torch.int64),
        reward=torch.rand(12, generator=generator, dtype=torch.float64).round(),
    )
    base, right = GroupCredit()(batch)[:, None], tempo.TreeCredit()(batch)
    shuffled = ShuffledTreeCredit(0)(batch)
    assert not torch.allclose(shuffled, right)
    for group in (slice(0, 6), slice(6, 12)):
        torch.testing.assert_close((shuffled - base)[group].sum(0), (right - base)[group].sum(0))
        rows = [sorted(map(tuple, (each - base)[group].mul(1e4).round().tolist())) for each in (shuffled, right)]
        assert rows[0] == rows[1]
    assert torch.equal(ShuffledTreeCredit(0)(batch), shuffled)


def test_variances_of_known_draws():
    """Beginnings that succeed with probability 0.2 or 0.8: a variance of 0.09 between, of 0.16 within."""
    rng = np.random.default_rng(0)
    chance = rng.choice([0.2, 0.8], size=(200, 40, 1))
    found = variances((rng.random((200, 40, 64)) < chance).astype(float))
    assert found["decided"] == pytest.approx(0.09 / 0.25, abs=0.02)
    assert all(ratio == pytest.approx(1.0, abs=0.05) for ratio in found["shrinkage"].values())


def test_the_page_is_what_the_rows_say():
    from benchmarks import recipes

    assert recipes.PAGE.read_text(encoding="utf-8") == recipes.page()
    measured = {
        name: recipes.load(recipes.RESULTS / f"{recipes.room_of(name)}_{name}.jsonl") for name in recipes.recipes()
    }
    assert all(measured[name] for name in ("tempo", "prefix-rft", "prefix-rl", "pppo"))
    for name, rows in measured.items():
        for row in rows:
            assert row["recipe"] == name
            assert {"method", "metric", "unit", "value", "spread", "baseline", "machine", "versions", "commit"} <= {
                *row
            }
            assert str(Path.home()) not in json.dumps(row)


# ---------------------------------------------------------------------------------------------- learning, in minutes


def slow_study(tmp_path, task, **changes):
    options = Options(output_dir=tmp_path, cache_dir=ROOT / ".cache" / "stemma")
    trainer = Config(
        num_generations=8, per_device_train_batch_size=64, learning_rate=2e-4, lr_scheduler_type="constant"
    )
    study = Study(name="slow", base=BasePolicy(), task=task, budget=170_000, trainer=trainer, options=options)
    return replace(study, evaluations=1, **changes)


@pytest.mark.slow
def test_grpo_learns(tmp_path):
    study = slow_study(tmp_path, Task(min_distance=4, max_distance=9, slack=2))
    curve = study.run("GRPO", 0)["curve"]
    assert curve[-1]["pass@1"] >= curve[0]["pass@1"] + 0.1

    def shuffled(batch):
        rewards = batch.reward[torch.randperm(len(batch.reward), generator=torch.Generator().manual_seed(0))]
        return GroupCredit()(replace(batch, reward=rewards, extras={}))

    control = study.run("control", 0, settings={"rewards": "shuffled"}, hooks=lambda _: {"credit": shuffled})
    assert control["curve"][-1]["pass@1"] < curve[0]["pass@1"] + 0.1


@pytest.mark.slow
def test_the_beginning_decides(tmp_path):
    from functools import partial

    study = slow_study(tmp_path, Task(min_distance=7, max_distance=9, slack=2))
    generate = partial(sample, study.model(), study.generator(), study.task.max_completion_length)
    rows = plain_rows(study.task.held_out(64))
    (found,) = pppo.beginning_lock_in(generate, rows, study.task.reward, diallock.tokenizer().decode, fractions=(0.3,))
    assert found.after_correct > found.correct > found.after_wrong


@pytest.mark.slow
def test_longer_prefixes_of_solutions_make_problems_easier(tmp_path):
    study = slow_study(tmp_path, Task(min_distance=10, max_distance=13, slack=0))
    model, length = study.model(), study.task.max_completion_length
    episodes = [diallock.oracle_episode(problem, Random(0)) for problem in study.task.held_out(48)]
    rates = []
    for share in (0.0, 0.5, 0.75):
        begun = [episode.completion_ids[: int(share * len(episode.completion_ids))] for episode in episodes]
        prompts = [episode.prompt_ids for episode in episodes]
        batch = sample(
            model, study.generator(), length, prompts, 8, list(range(48)), forced=[[ids] * 8 for ids in begun]
        )
        asked = [prompts[group] for group in batch.group_id.tolist()]
        rates.append(sum(study.task.reward(asked, batch.completions())) / len(asked))
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.slow
def test_prefixes_lead_out_of_the_stall(tmp_path):
    """Plain GRPO has next to no reward on the hard problems; training on prefixed ones alone lifts plain success."""
    study = replace(
        hard_study("slow", Options(output_dir=tmp_path, cache_dir=ROOT / ".cache" / "stemma")), evaluations=1
    )
    stalled = study.run("GRPO", 0, budget=150_000)
    assert stalled["per_step"]["reward"] < 0.05
    episodes = [diallock.oracle_episode(problem, Random(0)) for problem in study.task.training(0)]
    traces = [Trace(prompt_ids=e.prompt_ids, trace_ids=e.completion_ids, verified=True) for e in episodes]
    config = prefix_rl.Config(include_unprefixed=False)
    run = study.run(
        "PrefixRL",
        0,
        settings=asdict(config),
        hooks=lambda run: prefix_rl.hooks(config, replace(run, traces=traces)),
        **config.grpo_options,
    )
    start = study.outcomes(study.model(), 40)["right"]
    successes = round(run["final"]["pass@1"] * run["final"]["samples"])
    assert binomial(successes, run["final"]["samples"], start) < 0.01
