"""`compare_every`: both forwards over a bounded part of the batch, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

Make = Callable[..., Any]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_comparing_changes_nothing_but_the_clock(make_trainer: Make) -> None:
    compared, alone = make_trainer(compare_every=1), make_trainer()
    for _ in range(3):
        metrics, _ = compared.step(), alone.step()
        assert 0.0 < metrics["compare/gradient_error"] < 1e-10
        assert 0.0 < metrics["compare/logprob_error"] < 1e-12
        assert metrics["compare/loss_plain"] == pytest.approx(metrics["compare/loss_shared"], abs=1e-12)
        assert metrics["compare/time_ratio"] == metrics["compare/time_plain"] / metrics["compare/time_shared"]
    assert torch.equal(weights(alone), weights(compared))
    assert "compare/time_ratio" not in alone.step()


@pytest.mark.parametrize(("budget", "rows"), [(1, 2), (300, None)], ids=["two rows at least", "rows that fit"])
def test_comparing_costs_a_bounded_number_of_tokens(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, budget: int, rows: int | None
) -> None:
    """Tokens of the plain pass, counted at the embedding; the step itself stays what it is."""
    monkeypatch.setattr("stemma.rl.engine.update.COMPARED_TOKENS", budget)
    compared, alone = make_trainer(compare_every=1), make_trainer()
    widths: list[tuple[int, ...]] = []
    embedding = compared.model.get_input_embeddings()
    embedding.register_forward_pre_hook(
        lambda module, inputs: widths.append(tuple(inputs[0].shape)) if compared.model.training else None
    )
    compared.step(), alone.step()  # a hook is new to the guard against random numbers, which runs forwards of its own
    widths.clear()
    metrics, _ = compared.step(), alone.step()
    assert len(widths) == 3
    plain, shared, step = widths
    assert plain[0] == rows or (2 < plain[0] < 8 and plain[0] * plain[1] <= budget)
    assert shared[0] == step[0] == 1
    assert shared[1] < step[1]
    assert 0.0 < metrics["compare/gradient_error"] < 1e-10
    assert torch.equal(weights(alone), weights(compared))
