"""Completions without a token to train on: cut off and masked, or empty. Zero gradients, in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rl.scripted import Scripted
from stemma.data.diallock import EOS_ID

MODES = ({}, {"max_tokens": 20}, {"shared_prefix": False}, {"shared_prefix": False, "max_tokens": 20})

SOME = ([5, 6, EOS_ID], [7, EOS_ID], [8, 9, 10, 11], [])
"""Completions of a group: two that end, one that is cut off, one that is empty."""


def prompts(generation: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [2 + index, 3, 4, 5, 6]} for index in range(count)]


def train(make_trainer: Callable[..., Any], says: Callable[[list[int], int], Any], **options: Any) -> tuple[Any, Any]:
    trainer = make_trainer(
        prompts=prompts,
        generator=Scripted(says),
        max_completion_length=4,
        mask_truncated_completions=True,
        gradient_accumulation_steps=2,
        **options,
    )
    rows = [trainer.step() for _ in range(2)]
    return rows, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"credit": "rloo", "loss_type": "grpo"}, {"beta": 0.1, "num_iterations": 2}])
def test_all_modes_agree_where_some_groups_have_nothing(make_trainer: Callable[..., Any], options: Any) -> None:
    """The first micro-batch is cut off or empty as a whole; the second has a group with both."""

    def says(prompt: list[int], index: int) -> list[int]:
        return {2: [9] * 4, 3: [], 4: SOME[index]}.get(prompt[0], [prompt[0], index + 2, EOS_ID])

    rows, weights = train(make_trainer, says, **options)
    assert all(row["grad_norm"] > 0 for row in rows)
    for mode in (*MODES[1:], {"compare_every": 1}):
        others, changed = train(make_trainer, says, **options, **mode)
        for row, other in zip(rows, others, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], abs=1e-12)
            assert other["entropy"] == pytest.approx(row["entropy"])
            assert other.get("compare/gradient_error", 0.0) < 1e-10
        for name, value in weights.items():
            torch.testing.assert_close(changed[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("completion", [[9] * 4, []], ids=["cut off", "empty"])
def test_a_step_without_any_token_changes_nothing(
    make_trainer: Callable[..., Any], make_model: Callable[..., Any], completion: list[int], mode: Any
) -> None:
    rows, weights = train(make_trainer, lambda prompt, index: completion, **mode)
    assert [(row["loss"], row["grad_norm"], row["tokens/optimised"]) for row in rows] == [(0.0, 0.0, 0.0)] * 2
    for name, value in make_model().state_dict().items():
        assert torch.equal(value, weights[name])
