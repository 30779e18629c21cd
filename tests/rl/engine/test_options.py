"""The trainer's options: each group checks itself, what two groups share is checked where they meet."""

import dataclasses
from typing import Any

import pytest

from stemma.rl.engine.options import Config, Forward, Loss, Optimiser, Sampling

GROUPS = (Sampling, Optimiser, Loss, Forward)


def test_every_option_belongs_to_one_group() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert names == [field.name for field in dataclasses.fields(Config)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (Sampling, {"temperature": float("nan")}, "temperature must be a finite number; got nan"),
        (Sampling, {"num_generations": 2.5}, "num_generations must be a whole number; got 2.5"),
        (Sampling, {"num_generations": True}, "num_generations must be a whole number; got True"),
        (Sampling, {"top_p": 0}, r"top_p must be in \(0, 1\]"),
        (Sampling, {"importance_sampling_clip_min": 4.0}, "importance_sampling_clip_min must be below"),
        (Optimiser, {"learning_rate": float("inf")}, "learning_rate must be a finite number; got inf"),
        (Optimiser, {"learning_rate": -1e-6}, "learning_rate must be at least 0"),
        (Optimiser, {"learning_rate": "1e-6"}, "learning_rate must be a finite number; got '1e-6'"),
        (Optimiser, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation must be"),
        (Optimiser, {"steps_per_generation": 1.0}, "steps_per_generation must be a whole number, or None; got 1.0"),
        (Loss, {"loss_type": "ppo"}, "loss_type must be one of grpo, dr_grpo, dapo, bnpo, cispo; got 'ppo'"),
        (Loss, {"loss_type": "cispo"}, "epsilon_high must be the ceiling of the weight"),
        (Loss, {"delta": 1.1}, "delta must be above 1 \\+ epsilon_high = 1.2"),
        (Forward, {"bf16": 1}, "bf16 must be true or false; got 1"),
        (Forward, {"seed": -1}, "seed must be in"),
        (Forward, {"seed": 2**63}, "seed must be in"),
    ],
)
def test_a_group_refuses_alone_what_the_whole_refuses(group: type, options: dict[str, Any], message: str) -> None:
    for kind in (group, Config):
        with pytest.raises(ValueError, match=message):
            kind(**options)


def test_what_two_groups_share_is_checked_where_they_meet() -> None:
    Optimiser(per_device_train_batch_size=12)
    with pytest.raises(ValueError, match="a positive multiple of num_generations=8"):
        Config(per_device_train_batch_size=12)
    Loss(soft_punish_cache=600)
    with pytest.raises(ValueError, match=r"soft_punish_cache must be in \[0, max_completion_length=512\]; got 600"):
        Config(soft_punish_cache=600)
