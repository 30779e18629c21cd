"""Our loss against the installed TRL's own `_compute_loss`, called on made-up log-probabilities: value and gradient."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from stemma.rl.engine.advantages import group_relative
from stemma.rl.engine.losses import importance_weights, soft_overlong_punishment, token_loss, token_weights
from stemma.rl.engine.options import ImportanceSamplingMode

pytestmark = pytest.mark.trl

LENGTH = 5


def make_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([5, 1, 3, 4, 0, 5])  # a row without tokens: a masked truncated completion
    logprobs = -random(6, LENGTH).abs()
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.5 * random(6, LENGTH),
        "ref": logprobs + 0.5 * random(6, LENGTH),
        "sampling": logprobs + 0.4 * random(6, LENGTH),
        "entropies": random(6, LENGTH).abs(),
        "advantages": random(6),
        "token_advantages": random(6, LENGTH),
        "mask": torch.arange(LENGTH) < lengths[:, None],
    }


def trl_loss(data: dict[str, Tensor], options: dict) -> Tensor:
    """TRL's method on a stand-in trainer that only answers with our log-probabilities."""
    from trl import GRPOTrainer

    epsilon = options.get("epsilon", 0.2)
    ones = torch.ones(6, 1, dtype=torch.int64)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (data["logprobs"], data["entropies"], None),
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=options.get("use_bias_correction_kl", True),
            steps_per_generation=1,
        ),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        loss_type=options["loss_type"],
        epsilon_low=epsilon,
        epsilon_high=options.get("epsilon_high") or epsilon,
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        beta=options.get("beta", 0.0),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm="mode" in options,
        vllm_importance_sampling_correction=True,
        max_completion_length=7,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        entropy_coef=options.get("entropy_coef", 0.0),
        _entropy_bonus_enabled=bool(options.get("entropy_coef")),
        _metrics={"train": defaultdict(list)},
    )
    trainer.accelerator.sync_gradients = True
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones(6, LENGTH, dtype=torch.int64),
        "completion_mask": data["mask"].long(),
        "advantages": data["token_advantages" if options.get("per_token") else "advantages"],
        "importance_sampling_ratio": reference_ratio(data, options) if "mode" in options else None,
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": data["mask"].sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def reference_ratio(data: dict[str, Tensor], options: dict) -> Tensor:
    """What TRL documents for `vllm_importance_sampling_mode`, row by row; its code for it cannot be called alone."""
    level, action = options["mode"].split("_")
    low, high = options.get("clip_min") or 0.0, 3.0
    rows = []
    for mask, old, sampling in zip(data["mask"], data["old"], data["sampling"]):
        difference = [(o - s).item() if kept else 0.0 for o, s, kept in zip(old, sampling, mask)]
        difference = [sum(difference)] if level == "sequence" else difference
        ratios = [math.exp(value) for value in difference]
        if action == "truncate":
            rows.append([max(low, min(high, ratio)) for ratio in ratios])
        else:
            rows.append([ratio if low <= ratio <= high else 0.0 for ratio in ratios])
    return torch.tensor(rows, dtype=torch.float64)


def our_loss(data: dict[str, Tensor], options: dict) -> Tensor:
    options = dict(options)
    entropy_coef = options.pop("entropy_coef", 0.0)
    advantages = data["token_advantages" if options.pop("per_token", False) else "advantages"]
    tokens = int(data["mask"].sum())
    weights = token_weights(
        data["mask"], options["loss_type"], num_sequences=6, num_tokens=tokens, max_completion_length=7
    )
    mode, clip_min = options.pop("mode", None), options.pop("clip_min", None)
    if mode is not None:
        options["sampling_weights"] = importance_weights(
            data["old"], data["sampling"], data["mask"], mode=mode, clip_min=clip_min
        )
    token = token_loss(data["logprobs"], data["old"], advantages, data["mask"], ref_logprobs=data["ref"], **options)
    return (token.loss * weights).sum() - entropy_coef / tokens * data["entropies"][data["mask"]].sum()


CLIPS = [
    *({"epsilon_high": high, "delta": delta} for high in (None, 0.28) for delta in (None, 1.4)),
    {"epsilon": 3e-2, "epsilon_high": 4e-2},
]
LOSSES = [{"loss_type": name, **clip} for name in ("grpo", "dr_grpo", "dapo", "bnpo") for clip in CLIPS]
LOSSES += [{"loss_type": "cispo", "epsilon_high": ceiling} for ceiling in (1.0, 5.0)]
LEVELS = [{}, {"per_token": True}, {"importance_sampling_level": "sequence"}]
KL_TERMS = [{}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False}]
SAMPLERS = [{}, *({"mode": mode} for mode in get_args(ImportanceSamplingMode)), {"mode": "token_mask", "clip_min": 0.7}]
ENTROPY = [{}, {"entropy_coef": 0.05}]


@pytest.mark.parametrize("level", LEVELS, ids=lambda o: "-".join(map(str, o)) or "token")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradient_are_those_of_trl(loss: dict, level: dict) -> None:
    for seed, variants in enumerate(itertools.product(KL_TERMS, SAMPLERS, ENTROPY)):
        options = {**loss, **level}
        for variant in variants:
            options |= variant
        gradients = []
        for compute in (trl_loss, our_loss):
            data = make_batch(seed)
            leaves = [data["logprobs"].requires_grad_(), data["entropies"].requires_grad_()]
            value = compute(data, options)
            gradients.append([value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)])
        for name, theirs, ours in zip(("loss", "gradient of logprobs", "gradient of entropies"), *gradients):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-12, atol=1e-14, msg=lambda m, n=name, o=options: f"{o}, {n}: {m}"
            )


@pytest.mark.parametrize(("length", "cache"), [(20, 5), (20, 20), (20, 1), (7, 3)])
def test_overlong_penalty_is_that_of_trl(length: int, cache: int) -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = torch.arange(1, length + 5)
    expected = get_soft_overlong_punishment(length, cache)([[0] * n for n in lengths.tolist()])
    assert soft_overlong_punishment(lengths, length, cache).tolist() == expected


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale: str) -> None:
    from trl.trainer.utils import nanstd

    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0, 0.25, nan], [0.5, nan, nan, 2.0], [nan] * 4], dtype=torch.float64)
    deviation = rewards - rewards.nanmean(1, keepdim=True)
    std = nanstd(rewards, dim=1)[:, None] if scale == "group" else nanstd(rewards)
    expected = torch.nan_to_num(deviation if scale == "none" else deviation / (std + 1e-4), nan=0.0)
    got = group_relative(rewards.flatten(), torch.arange(12) // 4, scale_rewards=scale)
    torch.testing.assert_close(got.view(3, 4), expected, rtol=1e-12, atol=1e-14)
