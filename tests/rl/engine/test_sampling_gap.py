"""The sampler and the trainer are one policy: same precision, and a warning where they are not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rl.scripted import Scripted
from stemma.data.diallock import EOS_ID

Make = Callable[..., Any]


@pytest.mark.parametrize("bf16", [False, True])
def test_sampling_and_training_run_in_one_precision(make_trainer: Make, make_model: Make, bf16: bool) -> None:
    """Logits of decoding, of evaluation and of the update, at the head, where no flag can lie."""
    model = make_model("llama", torch.float32)
    trainer, seen = make_trainer(model, bf16=bf16), {True: set(), False: set()}
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen[module.training].add(output.dtype))
    metrics = trainer.step()
    trainer.evaluate(trainer.collector.prompts(9, 1))
    expected = {torch.bfloat16 if bf16 else torch.float32}
    assert seen == {True: expected, False: expected}
    assert metrics["sampling/sampling_logp_difference/mean"] < (2e-2 if bf16 else 1e-5)


def test_another_sampler_is_warned_of_once(make_trainer: Make) -> None:
    """It says that each of its tokens was certain, which this model is not."""
    says = Scripted(lambda prompt, index: [index, index + 1, EOS_ID])
    trainer = make_trainer(generator=says)
    with pytest.warns(UserWarning, match=r"sampler's log-probabilities are \d\.\d+ nats a token from the trainer's"):
        trainer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step()
        make_trainer(generator=says, importance_sampling_correction=True).step()  # which is the remedy
