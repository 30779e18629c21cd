"""A small GRPO run that any test can vary: a random model, DialLock prompts, a reward that differs between samples."""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from stemma.data import diallock
from stemma.models.tiny import tiny_model
from stemma.rl.grpo import Config, Trainer


def any_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Deterministic and different for different completions, so that a random model has something to learn from."""
    return [hashlib.blake2b(bytes(ids), digest_size=1).digest()[0] / 255 for ids in completion_ids]


def diallock_prompts(generation: int, count: int) -> list[dict[str, Any]]:
    rng = Random(generation)
    pool = diallock.problems("train", max_distance=4)
    return [
        {"prompt_ids": diallock.many_shot_prompt(diallock.draw_shots(pool, 2, rng, exclude=problem), problem)}
        for problem in diallock.draw_problems(pool, count, rng)
    ]


@pytest.fixture
def make_model() -> Callable[..., Any]:
    # GPT-2 by default: its norms keep float64, where Llama's go through float32.
    def make(model_type: str = "gpt2", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        sizes = {"vocab_size": diallock.VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
        return tiny_model(model_type, **{**sizes, **options}, dtype=dtype)

    return make


@pytest.fixture
def make_trainer(make_model: Callable[..., Any]) -> Callable[..., Trainer]:
    """`make_trainer(loss_type="grpo", ...)`: options of `Config`, and any argument of `Trainer`."""

    def make(model: Any = None, **options: Any) -> Trainer:
        arguments = {
            "prompts": diallock_prompts,
            "reward_funcs": any_reward,
            "processing_class": diallock.tokenizer(),
        }
        for name in (
            *arguments,
            "generator",
            "rollout",
            "credit",
            "loss_mask",
            "ref_model",
            "reward_weights",
            "accelerator",
        ):
            if name in options and not isinstance(options[name], str):  # credit="rloo" is an option of Config
                arguments[name] = options.pop(name)
        defaults = {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
        }
        return Trainer(make_model() if model is None else model, Config(**{**defaults, **options}), **arguments)

    return make
