"""Our loss against the installed TRL's own `_compute_loss`, called on made-up log-probabilities: value and gradient."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from stemma.rl._losses import group_relative, token_loss, token_weights

pytestmark = pytest.mark.trl

LENGTH = 5


def make_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([5, 1, 3, 4, 2, 5])
    logprobs = -random(6, LENGTH).abs()
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.5 * random(6, LENGTH),
        "ref": logprobs + 0.5 * random(6, LENGTH),
        "entropies": random(6, LENGTH).abs(),
        "advantages": random(6),
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
        use_vllm=False,
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
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": data["mask"].sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(data: dict[str, Tensor], options: dict) -> Tensor:
    options = dict(options)
    entropy_coef = options.pop("entropy_coef", 0.0)
    tokens = int(data["mask"].sum())
    weights = token_weights(
        data["mask"], options["loss_type"], num_sequences=6, num_tokens=tokens, max_completion_length=7
    )
    token = token_loss(
        data["logprobs"], data["old"], data["advantages"], data["mask"], ref_logprobs=data["ref"], **options
    )
    return (token.loss * weights).sum() - entropy_coef / tokens * data["entropies"][data["mask"]].sum()


OPTIONS = [
    *({"loss_type": name} for name in ("grpo", "dr_grpo", "dapo", "bnpo")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4, "beta": 0.1},
    {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False, "epsilon": 0.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.2},
    {"loss_type": "cispo", "epsilon_high": 1.0, "beta": 0.2, "entropy_coef": 0.05},
    {"loss_type": "dr_grpo", "entropy_coef": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradient_are_those_of_trl(options: dict) -> None:
    gradients = []
    for loss in (trl_loss, our_loss):
        data = make_batch(seed=7)
        leaves = [data["logprobs"].requires_grad_(), data["entropies"].requires_grad_()]
        value = loss(data, options)
        gradients.append([value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)])
    for name, theirs, ours in zip(("loss", "gradient of logprobs", "gradient of entropies"), *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


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
