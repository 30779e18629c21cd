"""Advantages and losses against slow loops, in float64; denominators against every split into micro-batches."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.rl.engine.advantages import group_relative, leave_one_out, zero_std_fraction
from stemma.rl.engine.losses import token_loss, token_weights, weighted_rewards

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
    lengths[0], lengths[1] = columns, 0
    logprobs = -random(rows, columns).abs()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * random(rows, columns),
        "ref_logprobs": logprobs + 0.4 * random(rows, columns),
        "advantages": random(rows),
        "token_advantages": random(rows, columns),
        "token_weights": random(rows, columns).exp(),
        "sequence_weights": random(rows, 1).exp(),
        "mask": torch.arange(columns) < lengths[:, None],
    }


def reference_token(ratio: Tensor, advantage: Tensor, logprob: Tensor, options: dict) -> Tensor:
    if options["loss_type"] == "cispo":
        return -min(ratio.item(), options["epsilon_high"]) * advantage * logprob
    high = options.get("epsilon_high") or 0.2
    if options.get("delta") and advantage < 0 and ratio > options["delta"]:  # dual clip, by cases
        return -options["delta"] * advantage
    if (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 0.8):
        return -(1 + high if advantage > 0 else 0.8) * advantage
    return -ratio * advantage


def reference_kl(logprob: Tensor, ref_logprob: Tensor, ratio: Tensor, options: dict) -> Tensor:
    estimator, corrected = options.get("kl_estimator", "k3"), options.get("use_bias_correction_kl", True)
    if estimator == "k1":
        value = logprob - ref_logprob
    elif estimator == "k2":
        return (logprob - ref_logprob) ** 2 / 2 * (ratio.item() if corrected else 1.0)
    else:
        value = (ref_logprob - logprob).exp() - 1 + logprob - ref_logprob
    return value * ratio if corrected else value


def reference_loss(data: dict[str, Tensor], options: dict) -> Tensor:
    """Every formula as a loop over rows and tokens, by cases."""
    total, (rows, columns) = torch.zeros((), dtype=torch.float64), data["mask"].shape
    tokens = int(data["mask"].sum())
    for i in range(rows):
        used = [t for t in range(columns) if data["mask"][i, t]]
        for t in used:
            logprob = data["logprobs"][i, t]
            log_ratio = logprob - data["old_logprobs"][i, t]
            if options.get("importance_sampling_level") == "sequence":
                log_ratio = sum(data["logprobs"][i, u] - data["old_logprobs"][i, u] for u in used) / len(used)
                if options.get("per_token"):  # GSPO-token
                    log_ratio = log_ratio.item() + logprob - logprob.item()
            ratio = log_ratio.exp()
            advantage = data["token_advantages"][i, t] if options.get("per_token") else data["advantages"][i]
            value = reference_token(ratio, advantage, logprob, options)
            if options.get("sampling"):
                value = value * data[options["sampling"]].expand(rows, columns)[i, t]
            if options.get("beta"):
                value = value + options["beta"] * reference_kl(logprob, data["ref_logprobs"][i, t], ratio, options)
            total = total + value / {"grpo": len(used) * rows, "dr_grpo": rows * 7}.get(options["loss_type"], tokens)
    return total


def loss_of(data: dict[str, Tensor], options: dict, weights: Tensor) -> Tensor:
    options = dict(options)
    sampling = options.pop("sampling", None)
    advantages = data["token_advantages" if options.pop("per_token", False) else "advantages"]
    token = token_loss(
        data["logprobs"],
        data["old_logprobs"],
        advantages,
        data["mask"],
        ref_logprobs=data["ref_logprobs"],
        sampling_weights=None if sampling is None else data[sampling],
        **options,
    )
    return (token.loss * weights).sum()


def weights_of(data: dict[str, Tensor], loss_type: str, num_sequences: int, num_tokens: int) -> Tensor:
    return token_weights(
        data["mask"], loss_type, num_sequences=num_sequences, num_tokens=num_tokens, max_completion_length=7
    )


LOSSES = [
    *({"loss_type": name} for name in ("grpo", "dr_grpo", "dapo", "bnpo")),
    *({"loss_type": "cispo", "epsilon_high": ceiling} for ceiling in (1.0, 5.0)),
    {"loss_type": "dr_grpo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    {"loss_type": "grpo", "delta": 1.3},
]
LEVELS = [{}, {"per_token": True}]
LEVELS += [{"importance_sampling_level": "sequence", **level} for level in LEVELS]
KL_TERMS = [
    {},
    *({"beta": 0.3, "kl_estimator": name} for name in ("k1", "k2", "k3")),
    *({"beta": 0.3, "kl_estimator": name, "use_bias_correction_kl": False} for name in ("k2", "k3")),
]
SAMPLERS = [{}, {"sampling": "token_weights"}, {"sampling": "sequence_weights"}]


def named(options: dict) -> str:
    return "-".join(str(value) for value in options.values()) or "plain"


def loss_and_gradient(data: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor]) -> tuple[Tensor, Tensor]:
    logprobs = data["logprobs"].clone().requires_grad_()
    value = loss({**data, "logprobs": logprobs})
    return value.detach(), torch.autograd.grad(value, logprobs)[0]


@pytest.mark.parametrize("level", LEVELS, ids=named)
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_loss_and_gradient_are_the_formula(loss: dict, level: dict) -> None:
    for seed, (kl, sampler) in enumerate(itertools.product(KL_TERMS, SAMPLERS)):
        options = {**loss, **level, **kl, **sampler}
        data = batch(seed=seed)
        weights = weights_of(data, loss["loss_type"], len(data["mask"]), int(data["mask"].sum()))
        got = loss_and_gradient(data, lambda d, o=options, w=weights: loss_of(d, o, w))
        expected = loss_and_gradient(data, lambda d, o=options: reference_loss(d, o))
        torch.testing.assert_close(got, expected, **EXACT, msg=lambda m, o=options: f"{o}: {m}")


def gradient_of_parts(options: dict, parts: list[slice], fixed: bool = True) -> tuple[float, Tensor]:
    """Loss and gradient of a batch summed over its parts; bnpo's denominators are those of the part."""
    data = batch(rows=8, columns=6, seed=3)
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


# 8 rows at once, in uneven parts, and as 8 micro-batches (or processes) of one.
SPLITS = [[slice(0, 4), slice(4, 8)], [slice(0, 1), slice(1, 2), slice(2, 8)], [slice(i, i + 1) for i in range(8)]]


@pytest.mark.parametrize("level", LEVELS, ids=named)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss["loss_type"] != "bnpo"], ids=named)
def test_no_split_changes_loss_or_gradient(loss: dict, level: dict) -> None:
    for kl, sampler in itertools.product(KL_TERMS, SAMPLERS):
        options = {**loss, **level, **kl, **sampler}
        whole, gradient = gradient_of_parts(options, [slice(0, 8)], fixed=False)
        for parts in SPLITS:
            split, split_gradient = gradient_of_parts(options, parts)
            assert split == pytest.approx(whole, rel=1e-12), options
            torch.testing.assert_close(split_gradient, gradient, **EXACT)


def test_bnpo_with_its_own_denominators_does_depend_on_the_split() -> None:
    whole, _ = gradient_of_parts({"loss_type": "bnpo"}, [slice(0, 8)], fixed=False)
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
