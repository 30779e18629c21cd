"""PPPO in the trainer: whole steps in float64."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from rollouts import assert_equal_steps, rows_with_demonstrations, without_times
from stemma.data import diallock
from stemma.errors import InvalidBatchError
from stemma.rl import grpo, prefix_rft, tempo
from stemma.rl.pppo import Config, RetainedMask, hooks, reference_accumulated_reward

Make = Callable[..., Any]
HALF = Config(eta_start=0.5, eta_max=0.9, num_continuations=3)


@pytest.fixture
def make(make_trainer: Make, make_model: Make) -> Make:
    """`make(Config(...), credit=..., **options of the trainer)`; without a Config plain GRPO."""

    def build(config: Config | None = None, **options: Any) -> grpo.Trainer:
        arguments = {name: options.pop(name) for name in ("loss_mask", "reward_funcs", "prompts") if name in options}
        model, given = make_model(), options.pop("credit", None)
        if config is not None:
            defaults = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 24}
            options = {**defaults, **options}
            trainer = grpo.Config(**options)
            run = grpo.Run(options=trainer, model=model, processing_class=diallock.tokenizer(), credit=given)
            made = hooks(config, run)
            arguments = {**made, **arguments}
        return make_trainer(model, **{"max_completion_length": 24, **options}, **arguments)

    return build


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_high": 0.28},
        {"loss_type": "grpo", "num_iterations": 2, "scale_rewards": "batch"},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1, "mask_truncated_completions": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_everything_retained_and_nothing_continued_is_grpo(make: Make, options: dict[str, Any]) -> None:
    whole = Config(eta_start=1.0, eta_max=1.0, num_continuations=0)
    one, two = make(whole, **options), make(**options)
    assert_equal_steps(one, two, tolerance=0.0)
    assert one._batch.extras["retained_len"].equal(one._batch.completion_mask.sum(-1))


@pytest.mark.parametrize(
    "options",
    [{"epsilon_high": 0.28}, {"num_iterations": 2, "loss_type": "grpo"}, {"loss_type": "dr_grpo", "max_tokens": 60}],
)
@pytest.mark.parametrize("tree", [False, True], ids=["group", "tree"])
def test_shared_forward_and_accumulation_leave_a_step_alone(make: Make, options: dict[str, Any], tree: bool) -> None:
    def run(**more: Any) -> grpo.Trainer:
        return make(HALF, credit=tempo.TreeCredit() if tree else None, **options, **more)

    assert_equal_steps(run(), run(shared_prefix=False))
    assert_equal_steps(run(), run(per_device_train_batch_size=4, gradient_accumulation_steps=2))


def test_rows_end_behind_their_last_retained_token_in_the_forward_and_no_number_changes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, full = make(HALF), make(HALF)
    monkeypatch.setattr(full.policy, "_tree", lambda batch: batch.tree())
    one, two = short.step(), full.step()
    for name in ("loss", "grad_norm", "tokens/optimised", "entropy"):
        assert two[name] == pytest.approx(one[name], rel=1e-12, abs=1e-14), name
    for left, right in zip(short.model.parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)
    lengths = short._batch.completion_mask.sum(-1)
    cut = int((lengths - short._batch.extras["retained_len"]).sum())
    assert cut > 40
    assert two["tokens/without_sharing"] - one["tokens/without_sharing"] == cut
    assert two["tokens/forwarded"] - one["tokens/forwarded"] > 0.8 * cut


def test_the_switch_optimises_the_retained_tokens_only(make: Make) -> None:
    trainer = make(HALF)
    metrics = trainer.step()
    batch = trainer._batch
    lengths = batch.completion_mask.sum(-1)
    expected = (0.5 * lengths).floor().clamp(min=1).long()
    assert torch.equal(batch.extras["retained_len"], expected)
    assert metrics["tokens/optimised"] == expected.sum() < lengths.sum()
    assert metrics["pppo/eta"] == 0.5
    assert metrics["pppo/retained_fraction"] == pytest.approx(expected.sum().item() / lengths.sum().item())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_normalizer_scales_the_gradient(make: Make, loss_type: str) -> None:
    def gradient(normalizer: Any) -> dict[str, torch.Tensor]:
        trainer = make(
            Config(eta_start=0.5, eta_max=0.5, num_continuations=1, normalizer=normalizer), loss_type=loss_type
        )
        batch, _ = trainer.collector.next_batch(0)
        micro, _ = trainer._optimiser_batch(batch, 0)
        trainer.policy.backward(micro[0], "plain", 0.0)
        return {name: p.grad for name, p in trainer.model.named_parameters()} | {"batch": batch}

    everything, kept = gradient("all"), gradient("kept")
    batch = everything.pop("batch")
    kept.pop("batch")
    if loss_type == "dapo":
        factor = batch.extras["retained_len"].sum() / batch.completion_mask.sum()
        for name, value in everything.items():
            torch.testing.assert_close(value, kept[name] * factor, rtol=1e-6, atol=1e-12)
    else:
        assert any(not torch.allclose(value, kept[name], rtol=1e-3) for name, value in everything.items())


def test_continuations_are_rewarded_as_answers_to_their_own_problem_and_never_trained_on(make: Make) -> None:
    calls: list[tuple[list[list[int]], list[list[int]]]] = []

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append((prompt_ids, completion_ids))
        return [(sum(ids) % 7) / 7 for ids in completion_ids]

    trainer = make(HALF, reward_funcs=reward)
    continued: list[Any] = []
    rollout = trainer.collector.rollout

    def kept(*arguments: Any) -> Any:
        batch = rollout(*arguments)
        continued.append(batch.extras["continuations"])
        return batch

    trainer.collector.rollout = kept
    metrics = trainer.step()
    batch, continuations = trainer._batch, continued[0]
    (prompts, completions), (more_prompts, more) = calls
    assert completions == batch.completions()
    assert more == continuations.completions()
    for prompt, row in zip(more_prompts, continuations.group_id.tolist(), strict=True):
        assert prompt == prompts[row] == batch.prompt_ids[row // 4]
    assert batch.further == []
    assert len(batch) == 8
    sampled = int(batch.sampled_mask.sum()) + int(continuations.sampled_mask.sum())
    assert metrics["tokens/sampled"] == sampled
    assert metrics["tokens/optimised"] == int(batch.extras["retained_len"].sum())
    total = reference_accumulated_reward(batch.reward, continuations.reward, continuations.group_id, 3)
    assert metrics["pppo/reward_accumulated"] == pytest.approx(total.mean().item() / 4, abs=1e-12)
    deviation = total - total.view(2, 4).mean(1).repeat_interleave(4)
    scale = total.view(2, 4).std(1).repeat_interleave(4) + 1e-4
    torch.testing.assert_close(batch.advantages.double(), deviation / scale, rtol=1e-6, atol=1e-6)


def test_rewards_that_cannot_be_given_do_not_stop_a_step(make: Make) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]

    trainer = make(HALF, reward_funcs=reward)
    trainer.step()
    assert trainer._batch.reward.isnan().any()
    assert trainer._batch.advantages.isfinite().all()


def test_evaluation_raises_eta_without_continuations_and_a_resumed_run_keeps_it(make: Make) -> None:
    rows = rows_with_demonstrations(9, 2)

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [float(len(text) % 3) for text in completions]

    calls: list[int] = []
    whole, first, second = (make(HALF, reward_funcs=reward) for _ in range(3))
    for trainer in (whole, first):
        trainer.step()
        calls.clear()
        for _ in range(2):  # the second repeats the first: no new best
            trainer.evaluate(rows)
        assert calls == [8, 8]
        assert trainer.collector.rollout.eta == pytest.approx(0.55)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    expected = [whole.step() for _ in range(2)]
    assert [without_times(second.step()) for _ in range(2)] == [without_times(metrics) for metrics in expected]
    assert expected[0]["pppo/eta"] == pytest.approx(0.55)


def test_demonstration_prefixes_are_refused(make: Make, make_trainer: Make, make_model: Make) -> None:
    trainer = make(HALF, prompts=rows_with_demonstrations, max_completion_length=32)
    trainer.collector.rollout = prefix_rft.PrefixSampling(
        prefix_rft.Config(),
        total_steps=10,
        vocab_size=diallock.VOCAB_SIZE,
        eos_token_id=[diallock.EOS_ID],
        max_completion_length=32,
    )
    with pytest.raises(InvalidBatchError, match="PPPO's mask needs PPPO's rollout"):
        trainer.step()


def test_a_beginning_that_decides_is_learnt_from_a_share_of_the_tokens(make: Make) -> None:
    """Right is what begins with an id below 8: few tokens are optimised and they learn it."""

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] < 8) for ids in completion_ids]

    rows = [{"prompt_ids": diallock.encode(problem.prompt)} for problem in diallock.problems("train", max_distance=1)]
    config = Config(eta_start=0.1, eta_max=0.1, num_continuations=1)
    trainer = make(
        config, prompts=lambda step, count: Random(step).sample(rows, count), reward_funcs=reward, learning_rate=1e-2
    )
    metrics = [trainer.step() for _ in range(20)]
    assert sum(m["reward"] for m in metrics[:5]) / 5 < 0.6
    assert sum(m["reward"] for m in metrics[-5:]) / 5 > 0.9
    assert all(m["tokens/optimised"] <= 0.2 * m["tokens/sampled"] for m in metrics)


def test_the_loss_mask_of_another_rollout_is_refused(make: Make) -> None:
    with pytest.raises(InvalidBatchError, match="PPPO's mask needs PPPO's rollout"):
        make(loss_mask=RetainedMask()).step()
