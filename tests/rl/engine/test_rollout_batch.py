"""The batch of rollouts, the prompt source and the checks on rewards."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import ShuffledRows, checked_advantages, end_token_ids
from stemma.rl.engine.rewards import score_completions


def make_batch(**changes: object) -> RolloutBatch:
    values = {
        "prompt_ids": [[5, 6, 7], [8, 9]],
        "group_id": torch.tensor([0, 0, 1, 1]),
        "completion_ids": torch.tensor([[1, 2, 0], [3, 0, 0], [1, 1, 1], [4, 5, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool(),
        "truncated": torch.tensor([False, False, True, False]),
        "forced_len": torch.tensor([0, 1, 0, 2]),
    }
    return RolloutBatch(**{**values, **changes})


def test_completions_are_unpadded_and_the_sampled_part_follows_the_forced_one() -> None:
    batch = make_batch()
    assert batch.completions() == [[1, 2], [3], [1, 1, 1], [4, 5]]
    assert batch.sampled_mask.int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_sequence_and_column_of_the_tree_are_row_and_column_of_the_batch() -> None:
    tree = make_batch().tree()
    rows = [tree.tokens[start:stop].tolist() for start, stop in zip(tree.offsets[:-1], tree.offsets[1:])]
    assert rows == [[5, 6, 7, 1, 2], [5, 6, 7, 3], [8, 9, 1, 1, 1], [8, 9, 4, 5]]
    assert tree.column[tree.scored].tolist() == [0, 1, 0, 0, 1, 2, 0, 1]


def test_groups_cut_whole_groups_out_of_every_tensor() -> None:
    batch = make_batch(reward=torch.arange(4.0), advantages=torch.arange(12.0).view(4, 3))
    part = batch.groups(1, 2)
    assert part.prompt_ids == [[8, 9]]
    assert part.group_id.tolist() == [0, 0]
    assert part.completions() == [[1, 1, 1], [4, 5]]
    assert part.reward.tolist() == [2.0, 3.0]
    assert part.advantages.tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    assert part.old_logprobs is None


def test_what_a_method_keeps_is_cut_moved_and_stored_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    more = replace(make_batch(), prompt_ids=[[5], [6], [7], [8]], group_id=torch.tensor([0, 2, 2, 3]))
    batch = make_batch(reward=torch.ones(4), extras={"kept": torch.arange(4), "more": more})
    part = batch.groups(1, 2)
    assert part.extras["kept"].tolist() == [2, 3]
    (further,) = part.further
    assert further.prompt_ids == [[7], [8]]
    assert further.group_id.tolist() == [0, 0, 1]
    assert further.completions() == more.completions()[1:]
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(self) or self)
    batch.to("cpu")
    for tensor in (batch.reward, batch.extras["kept"], more.completion_ids):
        assert any(tensor is each for each in moved)
    state = batch.state_dict()
    assert list(state["extras"]) == ["kept"]
    assert RolloutBatch(**state).extras["kept"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("has a hole", {"completion_mask": torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()}),
        ("ascending indices below 2", {"group_id": torch.tensor([0, 1, 0, 1])}),
        ("ascending indices below 2", {"group_id": torch.tensor([0, 0, 1, 2])}),
        ("forced_len exceeds", {"forced_len": torch.tensor([0, 2, 0, 0])}),
        ("RolloutBatch.truncated has shape", {"truncated": torch.zeros(3, dtype=torch.bool)}),
        ("RolloutBatch.old_logprobs has shape", {"old_logprobs": torch.zeros(4, 2)}),
        ("RolloutBatch.kept has shape", {"extras": {"kept": torch.zeros(3)}}),
        ("RolloutBatch.more has 2 prompts", {"extras": {"more": make_batch()}}),
    ],
)
def test_a_batch_that_is_none_is_refused(message: str, changes: dict) -> None:
    with pytest.raises(InvalidBatchError, match=message):
        make_batch(**changes)


def test_prompt_source_visits_every_row_once_an_epoch_in_a_new_order() -> None:
    rows = [{"prompt_ids": [i]} for i in range(10)]
    source = ShuffledRows(rows, seed=1)
    drawn = [row["prompt_ids"][0] for generation in range(10) for row in source(generation, 4)]
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # A function of the generation alone: a resumed run starts anywhere.
    assert list(ShuffledRows(rows, seed=1)(7, 4)) == list(source(7, 4))
    assert list(ShuffledRows(rows, seed=2)(7, 4)) != list(source(7, 4))
    with pytest.raises(InvalidDataError, match="no rows"):
        ShuffledRows([], seed=0)


ROWS = [{"prompt_ids": [5, 6, 7], "answer": "a"}, {"prompt_ids": [8, 9], "prompt": "as given", "answer": "b"}]


def decode(ids: list[int]) -> str:
    return "-".join(map(str, ids))


def test_reward_functions_get_texts_ids_and_columns_per_completion() -> None:
    seen = {}

    def reward(prompts: list, completions: list, completion_ids: list, **columns: list) -> list:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [1, None, 0.5, True]

    assert score_completions([reward], ROWS, make_batch(), decode) == [[1.0, None, 0.5, 1.0]]
    assert seen["prompts"] == ["5-6-7", "5-6-7", "as given", "as given"]
    assert seen["completions"] == ["1-2", "3", "1-1-1", "4-5"]
    assert seen["completion_ids"] == [[1, 2], [3], [1, 1, 1], [4, 5]]
    assert seen["answer"] == ["a", "a", "b", "b"]
    assert seen["prompt_ids"] == [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "many", "1", [1.0, 2.0], 10**400])
def test_a_reward_that_is_no_number_names_function_and_sample(bad: object) -> None:
    def clumsy(completions: list, **_: object) -> list:
        return [0.0, 0.0, bad, 0.0]

    with pytest.raises(InvalidDataError, match=r"'clumsy' returned .* for sample 2 .*as given.*1-1-1.*None"):
        score_completions([clumsy], ROWS, make_batch(), decode)


def test_a_wrong_number_of_rewards_is_refused() -> None:
    with pytest.raises(InvalidDataError, match=r"'<lambda>' returned 3 values for 4 completions"):
        score_completions([lambda **_: [0.0] * 3], ROWS, make_batch(), decode)


@pytest.mark.parametrize(
    "returned", [1.0, torch.tensor(1.0), None, {"reward": [0.0] * 4}, "0000", {0.0, 1.0, 2.0, 3.0}]
)
def test_a_reward_that_is_no_list_is_refused_by_type(returned: object) -> None:
    def wrong(**_: object) -> object:
        return returned

    kind = type(returned).__name__
    with pytest.raises(InvalidDataError, match=rf"'wrong' returned a value of type {kind}; return a list of 4 finite"):
        score_completions([wrong], ROWS, make_batch(), decode)


@pytest.mark.parametrize("kind", [tuple, torch.tensor, iter])
def test_any_series_of_numbers_is_a_reward(kind: Callable[[list[float]], Any]) -> None:
    assert score_completions([lambda **_: kind([0.0, 1.0, 2.0, True])], ROWS, make_batch(), decode) == [[0, 1, 2, 1]]


def test_async_rewards_are_awaited() -> None:
    """As TRL does; also where the caller's thread runs an event loop of its own, as in a notebook."""

    async def reward(completions: list[str], **_: object) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def notebook() -> list[list[float | None]]:
        return score_completions([reward], ROWS, make_batch(), decode)

    expected = score_completions([lambda completions, **_: list(map(len, completions))], ROWS, make_batch(), decode)
    assert score_completions([reward], ROWS, make_batch(), decode) == expected
    assert asyncio.run(notebook()) == expected


def test_a_reward_that_raises_is_called_once_and_named() -> None:
    calls = []

    def fragile(completions: list, **_: object) -> list:
        calls.append(len(completions))
        return [1 / (len(text) - 5) for text in completions]  # "1-1-1" has five characters

    with pytest.raises(InvalidDataError, match=r"'fragile' raised ZeroDivisionError") as caught:
        score_completions([fragile], ROWS, make_batch(), decode)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert calls == [4]


@pytest.mark.parametrize("advantages", [torch.zeros(3), torch.full((4,), torch.nan), torch.zeros(4, 2, 2)])
def test_advantages_are_checked(advantages: torch.Tensor) -> None:
    with pytest.raises(InvalidBatchError, match="credit function returned"):
        checked_advantages(advantages, 4)


def test_end_tokens_come_from_tokenizer_and_generation_config() -> None:
    class Tokenizer:
        eos_token_id: int | None = 1

    model = torch.nn.Linear(1, 1)
    assert end_token_ids(model, Tokenizer()) == [1]
    model.generation_config = Tokenizer()
    model.generation_config.eos_token_id = [3, 1]
    assert end_token_ids(model, Tokenizer()) == [1, 3]
    nothing = Tokenizer()
    nothing.eos_token_id = None
    with pytest.raises(InvalidDataError, match=r"set tokenizer\.eos_token"):
        end_token_ids(torch.nn.Linear(1, 1), nothing)
