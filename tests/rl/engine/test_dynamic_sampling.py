"""Dynamic sampling: which groups end up in the batch, what is logged, and what the loss makes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.rl.engine.dynamic_sampling import concatenate, different_rewards
from stemma.rl.engine.losses import token_loss, token_weights
from stemma.rl.grpo import RolloutBatch, Trainer

Make = Callable[..., Trainer]
NAN = float("nan")


def sometimes_equal(completion_ids: list[list[int]], prompt_ids: list[list[int]], **_: Any) -> list[float]:
    """Three of four prompts, by their tokens, give all their completions the same reward."""
    return [0.5 if is_equal(p) else sum(ids) % 17 / 17 for p, ids in zip(prompt_ids, completion_ids)]


def is_equal(prompt: list[int]) -> bool:
    return sum(prompt) % 4 > 0


def prompts(generation: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [3, 4, 5 + (generation * count + i) % 12]} for i in range(count)]


def always_equal(completions: list[str], **_: Any) -> list[float]:
    return [0.3] * len(completions)


# ---------------------------------------------------------------------------------------------- the batch


def test_the_batch_is_the_first_prompts_whose_rewards_differ(make_trainer: Make) -> None:
    trainer = make_trainer(dynamic_sampling=True, reward_funcs=sometimes_equal, prompts=prompts)
    metrics = trainer.step()
    assert trainer._batch.prompt_ids == [prompt for prompt in asked_from(0) if not is_equal(prompt)][:2]
    assert different_rewards(trainer._batch).all()
    assert (trainer._batch.advantages.view(2, 4).abs().amax(1) > 0).all()
    assert trainer.collector.generations == 3
    counts = {name: metrics[f"dynamic_sampling/groups_{name}"] for name in ("sampled", "kept", "filled")}
    assert counts == {"sampled": 6, "kept": 2, "filled": 0}
    # All that was sampled is paid for, and enters the mean reward.
    assert metrics["tokens/sampled"] > metrics["tokens/optimised"] == trainer._batch.completion_mask.sum()
    assert metrics["frac_reward_zero_std"] == pytest.approx(4 / 6)
    trainer.step()  # goes on behind the prompts that were sampled
    assert trainer._batch.prompt_ids == [prompt for prompt in asked_from(3) if not is_equal(prompt)][:2]


def asked_from(generation: int) -> list[list[int]]:
    return [row["prompt_ids"] for later in range(generation, generation + 6) for row in prompts(later, 2)]


def test_without_it_every_step_samples_once(make_trainer: Make) -> None:
    trainer = make_trainer(reward_funcs=sometimes_equal, prompts=prompts)
    metrics = trainer.step()
    assert trainer.collector.generations == 1
    assert not any(name.startswith("dynamic_sampling") for name in metrics)
    assert metrics["tokens/sampled"] == metrics["tokens/optimised"]


def test_at_the_limit_dropped_groups_fill_the_batch(make_trainer: Make) -> None:
    trainer = make_trainer(dynamic_sampling=True, max_generation_batches=3, reward_funcs=always_equal, prompts=prompts)
    metrics = trainer.step()
    assert trainer.collector.generations == 3
    counts = {name: metrics[f"dynamic_sampling/groups_{name}"] for name in ("sampled", "kept", "filled")}
    assert counts == {"sampled": 6, "kept": 0, "filled": 2}
    assert trainer._batch.prompt_ids == [row["prompt_ids"] for row in prompts(0, 2)]
    assert metrics["grad_norm"] == 0.0


def test_groups_that_fill_the_batch_keep_their_place(make_trainer: Make) -> None:
    trainer = make_trainer(
        dynamic_sampling=True,
        max_generation_batches=2,
        reward_funcs=sometimes_equal,
        prompts=lambda generation, count: prompts(generation + 1, count),
    )
    counts = trainer.step()
    assert (counts["dynamic_sampling/groups_kept"], counts["dynamic_sampling/groups_filled"]) == (1, 1)
    asked = asked_from(1)[:4]
    assert [is_equal(prompt) for prompt in asked] == [True, True, False, True]
    assert trainer._batch.prompt_ids == [asked[0], asked[2]]
    assert trainer._batch.group_id.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (trainer._batch.advantages.view(2, 4).abs().amax(1) > 0).tolist() == [False, True]


def test_lengths_do_not_make_equal_answers_different(make_trainer: Make) -> None:
    trainer = make_trainer(
        dynamic_sampling=True, max_generation_batches=2, reward_funcs=always_equal, soft_punish_cache=12
    )
    assert trainer.step()["dynamic_sampling/groups_kept"] == 0
    assert trainer._batch.reward.unique().numel() > 1  # punished all the same


def test_resumed_is_bit_equal_to_uninterrupted(make_trainer: Make) -> None:
    options = {"dynamic_sampling": True, "reward_funcs": sometimes_equal, "prompts": prompts, "num_iterations": 2}
    whole, first = make_trainer(**options), make_trainer(**options)
    rows = [whole.step() for _ in range(5)]
    for _ in range(3):
        first.step()
    second = make_trainer(**options)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for expected in rows[3:]:
        got = second.step()
        assert {k: v for k, v in got.items() if "time" not in k} == {
            k: v for k, v in expected.items() if "time" not in k
        }


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_dropping_equal_groups_scales_the_gradient(loss_type: str) -> None:
    """A group without gradient still counts in the denominators: with it, the others' gradient is smaller."""
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 3, 4])[:, None]
    logprobs = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5], dtype=torch.float64)  # the second group is equal

    def gradient(rows: list[int]) -> Tensor:
        weights = token_weights(
            mask[rows],
            loss_type,
            num_sequences=len(rows),
            num_tokens=int(mask[rows].sum()),
            max_completion_length=4,
        )
        token = token_loss(logprobs[rows], logprobs[rows].detach(), advantages[rows], mask[rows], loss_type=loss_type)
        return torch.autograd.grad((token.loss * weights).sum(), logprobs)[0]

    share = 4 / 17 if loss_type in ("dapo", "bnpo") else 2 / 6
    torch.testing.assert_close(gradient([0, 1, 4, 5]) * (1 - share), gradient([0, 1, 2, 3, 4, 5]))


# ---------------------------------------------------------------------------------------------- the pieces


def make_batch(rows: list[tuple[int, int]], first: int, continued: list[bool] | None) -> RolloutBatch:
    """Groups of 2 completions of the given lengths; `continued`: rows that have 2 continuations."""
    count = len(rows)
    lengths = torch.tensor(rows).flatten()
    columns = torch.arange(int(lengths.max()))
    ids = first + torch.arange(2 * count)[:, None] * 10 + columns
    batch = RolloutBatch(
        prompt_ids=[[first, group] for group in range(count)],
        group_id=torch.arange(count).repeat_interleave(2),
        completion_ids=torch.where(columns < lengths[:, None], ids, 0),
        completion_mask=columns < lengths[:, None],
        truncated=lengths > 3,
        forced_len=torch.zeros(2 * count, dtype=torch.int64),
        sampling_logprobs=-torch.rand(2 * count, len(columns)),
        reward=torch.rand(2 * count, dtype=torch.float64),
        encoded_tokens=count,
    )
    if continued is not None:
        kept = [row for row in range(2 * count) if continued[row % len(continued)]]
        own = torch.tensor(kept, dtype=torch.int64).repeat_interleave(2)
        batch.extras["continuations"] = RolloutBatch(
            prompt_ids=[[first, row // 2] for row in range(2 * count)],
            group_id=own,
            completion_ids=batch.completion_ids[own, :1] + 1000,
            completion_mask=torch.ones(len(own), 1, dtype=torch.bool),
            truncated=torch.zeros(len(own), dtype=torch.bool),
            forced_len=torch.zeros(len(own), dtype=torch.int64),
            sampling_logprobs=torch.zeros(len(own), 1),
            reward=torch.rand(len(own), dtype=torch.float64),
        )
    return batch


def by_prompt(batch: RolloutBatch) -> dict[tuple[int, ...], list[Any]]:
    """Everything that a batch says about each of its prompts, without padding."""
    found: dict[tuple[int, ...], list[Any]] = {tuple(prompt): [] for prompt in batch.prompt_ids}
    for row, ids in enumerate(batch.completions()):
        own = [ids, batch.truncated[row].item(), batch.reward[row].item()]
        own.append(batch.sampling_logprobs[row, : len(ids)].tolist())
        for others in batch.further:
            assert others.prompt_ids[row] == batch.prompt_ids[batch.group_id[row]]
            own.append([others.completions()[i] for i in (others.group_id == row).nonzero().squeeze(1)])
        found[tuple(batch.prompt_ids[batch.group_id[row]])].append(own)
    return found


groups = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


@given(
    st.lists(st.tuples(groups, st.lists(st.booleans(), min_size=1, max_size=3)), min_size=1, max_size=4), st.booleans()
)
def test_joining_and_choosing_groups_keeps_all_that_belongs_to_them(parts: list, further: bool) -> None:
    batches = [
        make_batch(rows, 100 * (i + 1), continued if further else None) for i, (rows, continued) in enumerate(parts)
    ]
    joined = concatenate(batches)
    expected = {k: v for batch in batches for k, v in by_prompt(batch).items()}
    assert by_prompt(joined) == expected
    assert joined.encoded_tokens == sum(batch.encoded_tokens for batch in batches)
    chosen = list(range(0, len(joined.prompt_ids), 2))
    picked = by_prompt(joined.select(chosen))
    assert list(picked) == [tuple(joined.prompt_ids[group]) for group in chosen]
    for prompt, rows in picked.items():
        assert rows == expected[prompt]


def test_which_groups_have_different_rewards() -> None:
    batch = make_batch([(1, 2), (2, 2), (1, 1)], 100, [True])
    batch.reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, NAN])
    batch.extras["continuations"].reward = torch.ones(12)
    assert different_rewards(batch).tolist() == [False, True, False]
    batch.extras["continuations"].reward[1] = 0.0  # of the first row: what continues it differs from it
    assert different_rewards(batch).tolist() == [True, True, False]
    assert different_rewards(replace(batch, extras={})).tolist() == [False, True, False]
