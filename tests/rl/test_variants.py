"""GRPO's variants: gradients of the KL estimators, weights against another sampler, and each switch of the trainer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.rl._losses import equal_reward_groups, importance_weights, kl_estimate, soft_overlong_punishment

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
