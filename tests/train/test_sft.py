"""Supervised steps: the loss of transformers, denominators of the whole batch, and a state that resumes."""

from random import Random

import pytest
import torch

from stemma.data import diallock
from stemma.errors import InvalidBatchError
from stemma.models.tiny import tiny_model
from stemma.train import sft


def batches(step: int) -> dict[str, torch.Tensor]:
    return diallock.packed_batch(diallock.problems("train", max_distance=3), Random(step), sequences=6, episodes=2)


def make_trainer(**options) -> sft.Trainer:
    model = tiny_model("llama", vocab_size=diallock.VOCAB_SIZE, hidden_size=32, num_hidden_layers=1)
    return sft.Trainer(model, sft.Config(**{"max_steps": 8, "warmup_steps": 2, **options}), batches=batches)


def test_the_loss_is_that_of_transformers() -> None:
    trainer = make_trainer()
    with torch.no_grad():
        expected = trainer.model(**batches(0)).loss.item()
    assert trainer.step()["loss"] == pytest.approx(expected, rel=1e-6)


def test_it_learns_and_resumes_to_the_same_numbers() -> None:
    whole, first = make_trainer(learning_rate=1e-2), make_trainer(learning_rate=1e-2)
    rows = [whole.step() for _ in range(8)]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    for _ in range(3):
        first.step()
    second = make_trainer(learning_rate=1e-2)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for expected in rows[3:]:
        got = second.step()
        assert {**got, "time/step": 0} == {**expected, "time/step": 0}


def test_a_batch_without_labels_is_refused() -> None:
    trainer = make_trainer()
    trainer.batches = lambda step: {**batches(step), "labels": torch.full_like(batches(step)["labels"], -100)}
    with pytest.raises(InvalidBatchError, match="no label other than -100"):
        trainer.step()


def test_nothing_to_train_is_refused() -> None:
    model = tiny_model("llama", vocab_size=diallock.VOCAB_SIZE, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sft.Trainer(model.requires_grad_(False), sft.Config(), batches=batches)


@pytest.mark.parametrize(("field", "value"), [("max_steps", 0), ("learning_rate", -1.0), ("warmup_steps", -1)])
def test_bad_options_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        sft.Config(**{field: value})
