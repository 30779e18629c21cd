"""GRPO's variants: gradients of the KL estimators, weights against another sampler, and each switch of the trainer."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.decode.rollout import LocalGenerator
from stemma.errors import InvalidBatchError
from stemma.rl.engine.advantages import equal_reward_groups
from stemma.rl.engine.hooks import independent_samples
from stemma.rl.engine.losses import importance_weights, kl_estimate, soft_overlong_punishment
from stemma.rl.grpo import RolloutBatch, Trainer

EXACT = {"rtol": 1e-12, "atol": 1e-14}
NAN = math.nan


# ---------------------------------------------------------------------------------------------- KL estimators


def expected_gradient(logits: Tensor, reference: Tensor, behaviour: Tensor, estimator: str, corrected: bool) -> Tensor:
    """Gradient of the estimator's mean over samples of `behaviour`, every outcome enumerated."""
    logprobs = logits.log_softmax(-1)
    ratio = (logprobs - behaviour).exp() if corrected else None
    value = kl_estimate(logprobs, reference, estimator=estimator, ratio=ratio)
    return torch.autograd.grad((behaviour.exp() * value).sum(), logits)[0]


@pytest.fixture
def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy over 5 tokens; log-probabilities of a reference and of an older policy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return rows[0].requires_grad_(), rows[1].log_softmax(0), (rows[0] + 0.3 * rows[2]).detach().log_softmax(0)


def divergence_gradient(logits: Tensor, reference: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)[0]


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_corrected_estimators_have_the_gradient_of_the_divergence(
    policies: tuple[Tensor, Tensor, Tensor], estimator: str, on_policy: bool
) -> None:
    logits, reference, older = policies
    behaviour = logits.detach().log_softmax(-1) if on_policy else older
    got = expected_gradient(logits, reference, behaviour, estimator, corrected=True)
    torch.testing.assert_close(got, divergence_gradient(logits, reference), **EXACT)


def test_gradients_of_uncorrected_estimators_on_policy(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, reference, _ = policies
    policy = logits.detach().log_softmax(-1)
    gradients = {
        name: expected_gradient(logits, reference, policy, name, corrected=False) for name in ("k1", "k2", "k3")
    }
    right = divergence_gradient(logits, reference)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(right), **EXACT)
    torch.testing.assert_close(gradients["k2"], right, **EXACT)
    # k3 has the gradient of the divergence in the other direction.
    logprobs = logits.log_softmax(-1)
    (other,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)
    torch.testing.assert_close(gradients["k3"], other, **EXACT)
    assert (other - right).abs().max() > 1e-2


def test_the_gradient_of_the_ratio_would_spoil_k2(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, reference, _ = policies
    logprobs = logits.log_softmax(-1)
    ratio = (logprobs - logprobs.detach()).exp()
    value = kl_estimate(logprobs, reference, estimator="k2") * ratio
    (spoilt,) = torch.autograd.grad((logprobs.detach().exp() * value).sum(), logits)
    assert (spoilt - divergence_gradient(logits, reference)).abs().max() > 1e-2


def test_values_of_the_estimators(policies: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, reference, _ = policies
    policy = logits.detach().log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    values = {name: kl_estimate(policy, reference, estimator=name) for name in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):  # unbiased
        torch.testing.assert_close((policy.exp() * values[name]).sum(), exact, **EXACT)
    assert values["k1"].min() < 0 < values["k3"].min()
    with pytest.raises(ValueError, match="kl_estimator must be one of"):
        kl_estimate(policy, reference, estimator="k4")


# ---------------------------------------------------------------------------------------------- weights


def reference_weights(own: list, sampler: list, sampled: list, mode: str, low: float, high: float) -> list:
    rows = []
    for row in zip(own, sampler, sampled):
        logs = [o - s if use and not math.isnan(s) else 0.0 for o, s, use in zip(*row)]
        ratios = [math.exp(value) for value in ([math.fsum(logs)] if "sequence" in mode else logs)]
        if "truncate" in mode:
            rows.append([min(max(ratio, low), high) for ratio in ratios])
        else:
            rows.append([0.0 if ratio < low or ratio > high else ratio for ratio in ratios])
    return rows


logprob = st.floats(-4, 0)


@given(
    st.lists(
        st.lists(st.tuples(logprob, logprob | st.just(NAN), st.booleans()), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.sampled_from([(None, 3.0), (0.5, 2.0), (0.7, None)]),
)
def test_importance_weights_are_the_formula(rows: list, mode: str, bounds: tuple[float | None, float | None]) -> None:
    own, sampler, sampled = (
        torch.tensor([[token[i] for token in row] for row in rows], dtype=dtype)
        for i, dtype in enumerate((torch.float64, torch.float64, torch.bool))
    )
    low, high = bounds
    got = importance_weights(own, sampler, sampled, mode=mode, clip_min=low, clip_max=high)
    expected = reference_weights(own.tolist(), sampler.tolist(), sampled.tolist(), mode, low or 0.0, high or math.inf)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_weights_turn_samples_of_another_distribution_into_those_of_the_policy() -> None:
    """Without a bound that cuts, the weighed mean over the sampler is the mean over the policy."""
    generator = torch.Generator().manual_seed(1)
    policy, sampler = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    value = torch.randn(6, generator=generator, dtype=torch.float64)
    # One-token sequences: each outcome is a row.
    rows = [x[:, None] for x in (policy, sampler)]
    for mode in ("token_truncate", "sequence_mask"):
        weights = importance_weights(*rows, torch.ones(6, 1, dtype=torch.bool), mode=mode, clip_max=1e9)
        corrected = (sampler.exp() * weights[:, 0] * value).sum()
        torch.testing.assert_close(corrected, (policy.exp() * value).sum(), **EXACT)


def test_overlong_penalty_falls_from_zero_to_minus_one() -> None:
    lengths = torch.tensor([1, 6, 7, 8, 10, 12])
    assert soft_overlong_punishment(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_groups_of_equal_rewards() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, NAN, 2.0, NAN])
    assert equal_reward_groups(rewards, torch.arange(8) // 2).tolist() == [True, False, True, True]


# ---------------------------------------------------------------------------------------------- in the trainer

Make = Callable[..., Trainer]


def sometimes_equal(completion_ids: list[list[int]], prompt_ids: list[list[int]], **_: Any) -> list[float]:
    """Every other prompt, by its tokens, gives all its completions the same reward."""
    return [0.5 if sum(p) % 2 else sum(ids) % 17 / 17 for p, ids in zip(prompt_ids, completion_ids)]


VARIANTS = [
    {"credit": "rloo", "beta": 0.1, "kl_estimator": "k1"},
    {"loss_type": "grpo", "beta": 0.1, "kl_estimator": "k2", "num_iterations": 2, "delta": 1.5},
    {"importance_sampling_correction": True, "importance_sampling_mode": "token_truncate", "temperature": 0.8},
    {"importance_sampling_correction": True, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"dynamic_sampling": True, "soft_punish_cache": 6, "num_iterations": 2, "reward_funcs": sometimes_equal},
]


def parameters_of(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same_run(one: Trainer, two: Trainer, steps: int = 3) -> None:
    for _ in range(steps):
        first, second = one.step(), two.step()
        for name in first:
            if "time" not in name and name not in ("tokens/forwarded", "tokens/forwarded_before_update"):
                assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-9), name
    torch.testing.assert_close(parameters_of(two), parameters_of(one), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, list(o.values())[:3])))
def test_shared_prefixes_train_like_the_plain_forward(make_trainer: Make, options: dict) -> None:
    assert_same_run(make_trainer(**options), make_trainer(shared_prefix=False, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, list(o.values())[:3])))
def test_accumulation_does_not_change_the_run(make_trainer: Make, options: dict) -> None:
    whole = make_trainer(per_device_train_batch_size=16, **options)
    split = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    assert_same_run(whole, split)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, list(o.values())[:3])))
def test_a_token_budget_does_not_change_the_run(make_trainer: Make, options: dict) -> None:
    assert_same_run(make_trainer(**options), make_trainer(max_tokens=80, **options), steps=2)


def test_rloo_subtracts_the_mean_of_the_others(make_trainer: Make) -> None:
    trainer = make_trainer(credit="rloo")
    trainer.step()
    rewards = trainer._batch.reward.view(2, 4)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(trainer._batch.advantages.view(2, 4), (rewards - others).float())


def test_the_kl_estimator_is_the_chosen_one(make_trainer: Make, make_model: Callable[..., Any]) -> None:
    reference = make_model(initializer_range=0.2, seed=1)
    kl = {
        name: make_trainer(beta=0.1, kl_estimator=name, ref_model=reference).step()["kl"] for name in ("k1", "k2", "k3")
    }
    assert len(set(kl.values())) == 3
    assert min(kl["k2"], kl["k3"]) > 0


def test_advantages_per_token_stay_at_their_tokens_with_a_ratio_per_sequence(make_trainer: Make) -> None:
    """On policy every ratio is 1, so token and sequence level have the same gradient, whatever the credit."""

    def credit(batch: RolloutBatch) -> Tensor:
        return torch.linspace(-1, 1, batch.completion_ids.numel()).view(batch.completion_ids.shape)

    norms = [
        make_trainer(credit=credit, importance_sampling_level=level).step()["grad_norm"]
        for level in ("token", "sequence")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


# ---------------------------------------------------------------------------------------------- importance correction


def test_a_faithful_sampler_needs_no_correction(make_trainer: Make) -> None:
    plain, corrected = make_trainer().step(), make_trainer(importance_sampling_correction=True).step()
    assert corrected["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert corrected["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert "sampling/importance_sampling_ratio/mean" not in plain


def test_an_unfaithful_sampler_is_weighed(make_trainer: Make) -> None:
    hotter = {"generator": LocalGenerator(eos_token_id=1, temperature=1.5), "importance_sampling_correction": True}
    token = make_trainer(importance_sampling_mode="token_truncate", importance_sampling_clip_max=1.2, **hotter).step()
    name = "sampling/importance_sampling_ratio"
    assert token[f"{name}/min"] < 0.99
    assert 1.0 < token[f"{name}/max"] <= 1.2
    masked = make_trainer(importance_sampling_clip_max=1e-9, **hotter).step()
    assert masked[f"{name}/max"] == masked["grad_norm"] == 0.0


def test_forced_tokens_have_weight_one(make_trainer: Make) -> None:
    """The sampler's log-probability of what it did not sample is no part of any weight."""

    def rollout(wrong: float, generate: Any, rows: Any, num_generations: int, seeds: Any, step: int) -> RolloutBatch:
        forced = [[[5, 6, 7]] * num_generations for _ in rows]
        batch = generate([row["prompt_ids"] for row in rows], num_generations, seeds, forced=forced)
        batch.sampling_logprobs[:, :3] = wrong
        return batch

    expected = make_trainer(rollout=partial(rollout, 0.0)).step()
    for wrong, mode in itertools.product((-50.0, NAN), ("token_truncate", "sequence_mask")):
        trainer = make_trainer(
            rollout=partial(rollout, wrong), importance_sampling_correction=True, importance_sampling_mode=mode
        )
        metrics = trainer.step()
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_correction_without_log_probabilities_is_refused(make_trainer: Make) -> None:
    def rollout(generate: Any, rows: Any, *rest: Any) -> RolloutBatch:
        return replace(independent_samples(generate, rows, *rest), sampling_logprobs=None)

    with pytest.raises(InvalidBatchError, match="importance_sampling_correction needs"):
        make_trainer(rollout=rollout, importance_sampling_correction=True).step()


# ---------------------------------------------------------------------------------------------- overlong penalty


def test_overlong_completions_lose_reward_in_training_only(make_trainer: Make) -> None:
    rows = make_trainer().collector.prompts(99, 5)
    plain, punished = make_trainer(), make_trainer(soft_punish_cache=6)
    assert plain.evaluate(rows) == punished.evaluate(rows)
    first, second = plain.step(), punished.step()
    lengths = punished._batch.completion_mask.sum(-1)
    penalty = soft_overlong_punishment(lengths, 12, 6)
    assert penalty.min() == -1.0
    torch.testing.assert_close(punished._batch.reward, plain._batch.reward + penalty)
    name = "rewards/soft_overlong_punishment/mean"
    assert second[name] == pytest.approx(penalty.mean().item())
    assert second["reward"] == pytest.approx(first["reward"] + second[name])
    assert name not in first
