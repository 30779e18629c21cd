"""The loop and its trainer: parts of a batch are the whole, losses of any kind, and who is called when."""

import pytest
import torch

from stemma.errors import InvalidBatchError
from stemma.train import fit

TARGET = torch.tensor([[1.0], [-2.0], [0.5]])


def batches(step: int) -> dict[str, torch.Tensor]:
    """Rows with one to three items each."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "kept": torch.arange(3) <= torch.arange(6)[:, None] % 3}


def squares(model, batch):
    errors = (model(batch["x"]) - batch["x"] @ TARGET.double())[..., 0].square()[batch["kept"]]
    return errors.sum(), {"largest": errors.detach().amax().item() if len(errors) else 0.0}


def make(**options) -> fit.Trainer:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    config = fit.Config(**{"max_steps": 6, "learning_rate": 0.1, "warmup_steps": 1, **options})
    return fit.Trainer(model, config, batches=batches, loss=squares, num_items=lambda batch: int(batch["kept"].sum()))


def test_the_loss_is_the_mean_over_items():
    trainer = make()
    batch = batches(0)
    with torch.no_grad():
        errors = (trainer.model(batch["x"]) - batch["x"] @ TARGET.double())[..., 0].square()
    metrics = trainer.step()
    assert metrics["loss"] == pytest.approx(float((errors * batch["kept"]).sum() / 12), rel=1e-12)
    assert metrics["num_tokens"] == 12


@pytest.mark.parametrize("parts", [2, 4, 6, 9])
def test_a_batch_in_parts_is_the_whole_batch(parts):
    whole, cut = make(), make(gradient_accumulation_steps=parts)
    for _ in range(6):
        expected, got = whole.step(), cut.step()
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-12)
    torch.testing.assert_close(cut.model.weight, whole.model.weight, rtol=1e-12, atol=0)


def test_the_loop_says_what_happens_when():
    trainer, calls = make(), []
    finished = fit.run_steps(
        trainer,
        on_step=lambda metrics: calls.append(f"step {trainer.completed_steps}"),
        save=lambda metrics: calls.append("save"),
        save_steps=4,
        evaluate=lambda: calls.append("evaluate") or {},
        eval_steps=3,
    )
    assert finished
    before, between = ["evaluate", "step 1", "step 2", "step 3"], ["evaluate", "step 4", "save", "step 5", "step 6"]
    assert calls == [*before, *between, "save", "evaluate"]


def test_an_interrupted_run_ends_where_a_whole_one_does():
    whole, first, second = make(), make(), make()
    rows = []
    fit.run_steps(whole, on_step=rows.append)
    for _ in range(4):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    again = []
    fit.run_steps(second, on_step=again.append)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[4:]]
    assert torch.equal(second.model.weight, whole.model.weight)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_batch_without_items_is_refused():
    trainer = make()
    trainer.batches = lambda step: {**batches(step), "kept": torch.zeros(6, 3, dtype=torch.bool)}
    with pytest.raises(InvalidBatchError, match="batch of step 0 has no item"):
        trainer.step()


@pytest.mark.parametrize("field", ["max_steps", "gradient_accumulation_steps"])
def test_bad_options_are_named(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1; got 0"):
        fit.Config(**{field: 0})
