"""Advantages and losses against slow loops, in float64; denominators against every split into micro-batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.rl._losses import (
    group_relative,
    leave_one_out,
    token_loss,
    token_weights,
    weighted_rewards,
    zero_std_fraction,
)

NAN = math.nan
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- advantages


def reference_advantages(rewards: list[float], groups: list[int], scale: str) -> list[float]:
    """The formula, one row at a time."""

    def std(values: list[float]) -> float:
        if len(values) < 2:
            return 0.0
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    everyone = [r for r in rewards if not math.isnan(r)]
    result = []
    for reward, group in zip(rewards, groups):
        mates = [r for r, g in zip(rewards, groups) if g == group and not math.isnan(r)]
        if math.isnan(reward) or max(mates) == min(mates):
            result.append(0.0)
            continue
        deviation = reward - sum(mates) / len(mates)
        scaled = {"group": std(mates) + 1e-4, "batch": std(everyone) + 1e-4, "none": 1.0}[scale]
        result.append(deviation / scaled)
    return result


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, -2.5, 3.75, NAN]), st.integers(0, 3)), min_size=1, max_size=24),
    st.sampled_from(["group", "batch", "none"]),
)
def test_group_relative_is_the_formula(rows: list[tuple[float, int]], scale: str) -> None:
    rewards, groups = [list(column) for column in zip(*rows)]
    got = group_relative(tensor(rewards), torch.tensor(groups), scale_rewards=scale)
    torch.testing.assert_close(got, tensor(reference_advantages(rewards, groups, scale)), **EXACT)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.3, NAN]), st.integers(0, 3)), min_size=1, max_size=24))
def test_leave_one_out_is_the_formula(rows: list[tuple[float, int]]) -> None:
    rewards, groups = [list(column) for column in zip(*rows)]
    expected = []
    for i, (reward, group) in enumerate(rows):
        others = [r for j, (r, g) in enumerate(rows) if g == group and j != i and not math.isnan(r)]
        same = len({r for r, g in rows if g == group and not math.isnan(r)}) < 2
        expected.append(0.0 if math.isnan(reward) or not others or same else reward - sum(others) / len(others))
    got = leave_one_out(tensor(rewards), torch.tensor(groups))
    torch.testing.assert_close(got, tensor(expected), **EXACT)


def test_rloo_is_grpo_without_scaling_times_g_over_g_minus_one() -> None:
    rewards, groups = tensor([1, 0, 0.5, 2, 1, 1, 0, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(
        leave_one_out(rewards, groups), group_relative(rewards, groups, scale_rewards="none") * 4 / 3, **EXACT
    )


def test_equal_rewards_have_no_advantage_at_all() -> None:
    # The mean of three 0.1 is not 0.1 in floating point; divided by 1e-4 the rounding would be a gradient.
    rewards, groups = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64)
    assert group_relative(rewards, groups).tolist() == [0.0, 0.0, 0.0]
    assert leave_one_out(rewards, groups).tolist() == [0.0, 0.0, 0.0]


def test_advantages_do_not_depend_on_the_order_of_rows() -> None:
    rewards, groups = torch.randn(12, dtype=torch.float64), torch.arange(12) // 4
    order = torch.randperm(12)
    torch.testing.assert_close(
        group_relative(rewards[order], groups[order]), group_relative(rewards, groups)[order], **EXACT
    )


def test_batch_scale_uses_the_rewards_of_all_processes() -> None:
    rewards, groups = tensor([0, 1]), torch.tensor([0, 0])
    everyone = tensor([0, 1, 5, 9])
    got = group_relative(rewards, groups, scale_rewards="batch", all_rewards=everyone)
    torch.testing.assert_close(got, tensor([-0.5, 0.5]) / (everyone.std() + 1e-4), **EXACT)


def test_share_of_groups_without_gradient() -> None:
    rewards, groups = tensor([1, 1, 0, 1, NAN, NAN, 2, NAN]), torch.arange(8) // 2
    assert zero_std_fraction(rewards, groups).item() == 0.75


def test_wrong_shapes_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="one reward and one group per sequence"):
        group_relative(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale_rewards must be one of"):
        group_relative(torch.zeros(2), torch.zeros(2, dtype=torch.int64), scale_rewards="std")


def test_rewards_are_weighted_and_none_means_unscorable() -> None:
    totals = weighted_rewards([[1.0, None, None], [0.5, 2.0, None]], [1.0, 3.0])
    assert totals[:2] == [2.5, 6.0]
    assert math.isnan(totals[2])


# ---------------------------------------------------------------------------------------------- losses


def batch(rows: int = 6, columns: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(0, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    logprobs = -random(rows, columns).abs()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * random(rows, columns),
        "ref_logprobs": logprobs + 0.4 * random(rows, columns),
        "advantages": random(rows),
        "mask": torch.arange(columns) < lengths[:, None],
    }


def reference_token(ratio: float, advantage: float, logprob: float, options: dict) -> float:
    if options["loss_type"] == "cispo":
        return -min(ratio, options["epsilon_high"]) * advantage * logprob
    high = options.get("epsilon_high") or 0.2
    clipped = min(max(ratio, 0.8), 1 + high)
    bounded = min(ratio, options["delta"]) if options.get("delta") else ratio
    return -min(bounded * advantage, clipped * advantage)


def reference_loss(data: dict[str, Tensor], options: dict) -> float:
    """Every formula as a loop over rows and tokens."""
    total, rows, columns = 0.0, *data["mask"].shape
    tokens = int(data["mask"].sum())
    for i in range(rows):
        used = [t for t in range(columns) if data["mask"][i, t]]
        log_ratios = [(data["logprobs"][i, t] - data["old_logprobs"][i, t]).item() for t in used]
        for t, log_ratio in zip(used, log_ratios):
            if options.get("importance_sampling_level") == "sequence":
                log_ratio = sum(log_ratios) / len(log_ratios)
            ratio, logprob = math.exp(log_ratio), data["logprobs"][i, t].item()
            value = reference_token(ratio, data["advantages"][i].item(), logprob, options)
            if options.get("beta"):
                d = data["ref_logprobs"][i, t].item() - logprob
                kl = math.exp(d) - d - 1
                value += options["beta"] * kl * (ratio if options.get("use_bias_correction_kl", True) else 1.0)
            total += value / {"grpo": len(used) * rows, "dr_grpo": rows * 7}.get(options["loss_type"], tokens)
    return total


def loss_of(data: dict[str, Tensor], options: dict, weights: Tensor) -> Tensor:
    keys = ("logprobs", "old_logprobs", "advantages", "mask")
    token = token_loss(*(data[key] for key in keys), ref_logprobs=data["ref_logprobs"], **options)
    return (token.loss * weights).sum()


def weights_of(data: dict[str, Tensor], loss_type: str, num_sequences: int, num_tokens: int) -> Tensor:
    return token_weights(
        data["mask"], loss_type, num_sequences=num_sequences, num_tokens=num_tokens, max_completion_length=7
    )


OPTIONS = [
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    {"loss_type": "bnpo", "beta": 0.1},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2, "epsilon_high": 0.1},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "delta": 1.3},
    {"loss_type": "cispo", "epsilon_high": 1.0, "importance_sampling_level": "sequence"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_the_formula(options: dict, seed: int) -> None:
    data = batch(seed=seed)
    weights = weights_of(data, options["loss_type"], len(data["mask"]), int(data["mask"].sum()))
    got = loss_of(data, options, weights).item()
    assert got == pytest.approx(reference_loss(data, options), rel=1e-12)


def gradient_of_parts(options: dict, parts: list[slice], fixed: bool = True) -> tuple[float, Tensor]:
    """Loss and gradient of a batch summed over its parts; bnpo's denominators are those of the part."""
    data = batch(rows=9, columns=6, seed=3)
    data["logprobs"].requires_grad_()
    sequences, tokens = len(data["mask"]), int(data["mask"].sum())
    total = 0.0
    for part in parts:
        piece = {key: value[part] for key, value in data.items()}
        local = int(piece["mask"].sum()) * len(parts)
        loss = loss_of(piece, options, weights_of(piece, options["loss_type"], sequences, tokens if fixed else local))
        loss.backward()
        total += loss.item()
    return total, data["logprobs"].grad


SPLITS = [[slice(0, 4), slice(4, 9)], [slice(0, 1), slice(1, 2), slice(2, 9)], [slice(i, i + 1) for i in range(9)]]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("parts", SPLITS, ids=len)
def test_no_split_changes_loss_or_gradient(options: dict, parts: list[slice]) -> None:
    whole, gradient = gradient_of_parts(options, [slice(0, 9)])
    split, split_gradient = gradient_of_parts(options, parts)
    assert split == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(split_gradient, gradient, **EXACT)


def test_bnpo_with_its_own_denominators_does_depend_on_the_split() -> None:
    whole, _ = gradient_of_parts({"loss_type": "bnpo"}, [slice(0, 9)], fixed=False)
    split, _ = gradient_of_parts({"loss_type": "bnpo"}, SPLITS[0], fixed=False)
    assert abs(split - whole) > 1e-3


def test_a_batch_without_tokens_weighs_nothing() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"):
        weights = token_weights(mask, loss_type, num_sequences=2, num_tokens=0, max_completion_length=3)
        assert weights.sum().item() == 0.0


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    data = batch()
    logprobs = data["logprobs"].clone().requires_grad_()
    token = token_loss(logprobs, logprobs.detach(), data["advantages"], data["mask"])
    token.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -data["advantages"][:, None].expand_as(logprobs), **EXACT)


def test_advantages_per_token_and_per_sequence_agree() -> None:
    data = batch()
    per_token = {**data, "advantages": data["advantages"][:, None].expand_as(data["logprobs"])}
    weights = weights_of(data, "dapo", 6, int(data["mask"].sum()))
    assert loss_of(per_token, {}, weights) == loss_of(data, {}, weights)


def test_bias_corrected_kl_has_the_gradient_of_reverse_kl() -> None:
    # Expectation over the policy of the gradient, exactly, on a small categorical distribution.
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)

    def gradient(corrected: bool) -> Tensor:
        row = policy[None]
        token = token_loss(
            row,
            row.detach(),
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, 5, dtype=torch.bool),
            ref_logprobs=reference[None],
            beta=1.0,
            use_bias_correction_kl=corrected,
        )
        return torch.autograd.grad((token.loss * policy.detach().exp()).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(True), expected, **EXACT)
    assert (gradient(False) - expected).abs().max() > 1e-2


def test_clipping_is_counted_where_it_cuts_the_gradient() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = tensor([[0.5, 0.5, -0.5, -0.5]]).requires_grad_()
    advantages = tensor([[1.0, -1.0, 1.0, -1.0]])
    token = token_loss(logprobs, old, advantages, torch.ones(1, 4, dtype=torch.bool))
    token.loss.sum().backward()
    assert token.clipped_high.tolist() == [[True, False, False, False]]
    assert token.clipped_low.tolist() == [[False, False, False, True]]
    assert (logprobs.grad == 0).tolist() == [[True, False, False, True]]


def test_missing_inputs_are_named() -> None:
    data = batch()
    keys = [data[key] for key in ("logprobs", "old_logprobs", "advantages", "mask")]
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        token_loss(*keys, beta=0.1)
    with pytest.raises(ValueError, match="cispo' needs epsilon_high"):
        token_loss(*keys, loss_type="cispo")
    with pytest.raises(ValueError, match="importance_sampling_level"):
        token_loss(*keys, importance_sampling_level="word")
    with pytest.raises(ValueError, match="loss_type must be one of"):
        token_weights(data["mask"], "mean", num_sequences=1, num_tokens=1, max_completion_length=1)
