"""Tree credit against a brute-force reference, the identities it obeys, and GRPO, to which it must reduce."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.errors import InvalidBatchError
from stemma.rl import tempo
from stemma.rl.engine.advantages import GroupCredit, group_relative, leave_one_out
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Run
from stemma.rl.engine.options import Config as TrainerConfig
from stemma.rl.tempo import TreeCredit, ValueTree, reference_states, tree_td_advantages

NAN = float("nan")
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch_of(completions: list[list[int]], rewards: list[float], groups: list[int] | None = None) -> Batch:
    """Rewards, ids, mask and groups; the padding repeats token 1, which completions use too."""
    lengths = torch.tensor([len(ids) for ids in completions])
    width = max(int(lengths.max()), 1)
    ids = torch.tensor([[*row, *[1] * (width - len(row))] for row in completions])
    group = torch.tensor(groups or [0] * len(completions))
    return torch.tensor(rewards, dtype=torch.float64), ids, torch.arange(width) < lengths[:, None], group


@st.composite
def batches(draw: st.DrawFn, rewards: st.SearchStrategy[float] | None = None) -> Batch:
    """Groups of 2 to 6 short completions over three tokens, so that most share a beginning; rows in any order."""
    reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, NAN]), st.floats(-2, 2)) if rewards is None else rewards
    completion = st.lists(st.integers(0, 2), min_size=0, max_size=5)
    row = st.tuples(completion, reward)
    groups = draw(st.lists(st.lists(row, min_size=2, max_size=6), min_size=1, max_size=3))
    names = draw(st.permutations([3, 11, 70_000]))
    flat = [(ids, r, name) for name, rows in zip(names, groups, strict=False) for ids, r in rows]
    flat = draw(st.permutations(flat))
    return batch_of([ids for ids, _, _ in flat], [r for _, r, _ in flat], [name for _, _, name in flat])


def differences(batch: Batch) -> Tensor:
    return torch.from_numpy(ValueTree.build(*batch).differences())


# ---------------------------------------------------------------------------------------------- by hand


HAND = batch_of([[1, 2, 3], [1, 2, 4], [1, 5], [6]], [1.0, 0.0, 1.0, 0.0])


def test_a_tree_computed_by_hand() -> None:
    """Root 1/2; behind 1: 2/3; behind 1 2: 1/2; then every completion by itself."""
    tree = ValueTree.build(*HAND)
    expected = [[1 / 2, 2 / 3, 1 / 2, 1], [1 / 2, 2 / 3, 1 / 2, 0], [1 / 2, 2 / 3, 1, 1], [1 / 2, 0, 0, 0]]
    assert tree.states().tolist() == expected
    deltas = torch.tensor([[1 / 6, -1 / 6, 1 / 2], [1 / 6, -1 / 6, -1 / 2], [1 / 6, 1 / 3, 0], [-1 / 2, 0, 0]])
    torch.testing.assert_close(differences(HAND), deltas.double(), rtol=1e-6, atol=1e-7)
    std = (4 * 0.25 / 3) ** 0.5
    row = [(0.5 + delta) / (std + 1e-4) for delta in (1 / 6, -1 / 6, 1 / 2)]
    assert tree_td_advantages(*HAND)[0].tolist() == pytest.approx(row, rel=1e-12)


def test_metrics_by_hand() -> None:
    """Every token moves the value; ``1 2`` is shared twice, ``1`` a third time; the root, ``1`` and ``1 2`` branch."""
    metrics = ValueTree.build(*HAND).metrics()
    assert metrics == {
        "tree/branch_frac": 1.0,
        "tree/mean_shared_depth": pytest.approx((2 + 2 + 1 + 0) / 4),
        "tree/mean_descendants_at_branch": pytest.approx((4 + 3 + 2) / 3),
    }


def test_two_completions_that_part_once() -> None:
    batch = batch_of([[5, 5, 7, 8], [5, 5, 9, 8]], [1.0, 0.0])
    assert differences(batch).tolist() == [[0, 0, 0.5, 0], [0, 0, -0.5, 0]]
    metrics = ValueTree.build(*batch).metrics()
    assert metrics == {"tree/branch_frac": 0.25, "tree/mean_shared_depth": 2, "tree/mean_descendants_at_branch": 2}


def test_a_completion_that_begins_another_ends_in_an_inner_node() -> None:
    """Cut off without an end token, the first is worth what both were worth."""
    batch = batch_of([[4, 4], [4, 4, 2]], [0.0, 1.0])
    assert ValueTree.build(*batch).states().tolist() == [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0]]


def test_equal_completions_with_other_rewards_are_plain_grpo() -> None:
    rewards, *rest = batch_of([[4, 2], [4, 2], [4, 2]], [0.1, 0.7, 0.4])
    expected = group_relative(rewards, rest[-1])[:, None].expand(-1, 2)
    assert torch.equal(tree_td_advantages(rewards, *rest), expected)
    metrics = ValueTree.build(rewards, *rest).metrics()
    assert metrics == {"tree/branch_frac": 0, "tree/mean_shared_depth": 2, "tree/mean_descendants_at_branch": 0}


def test_one_token_each() -> None:
    rewards, *rest = batch_of([[4], [5], [5]], [1.0, 0.0, 1.0])
    assert differences((rewards, *rest))[:, 0].tolist() == pytest.approx([1 / 3, -1 / 6, -1 / 6])


def test_groups_with_equal_tokens_share_nothing() -> None:
    one = batch_of([[1, 2], [1, 3]], [1.0, 0.0])
    both = batch_of([[1, 2], [1, 3], [1, 2], [1, 3]], [1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1])
    assert torch.equal(differences(both)[:2], differences(one))
    assert not differences(both)[2:].any()


def test_equal_rewards_are_their_own_mean() -> None:
    """Added up and divided, six times 0.1 is not 0.1, and every branch would have credit of 1e-13."""
    rewards = [0.1] * 6
    assert sum(rewards) / 6 != 0.1
    batch = batch_of([[1, 2], [1, 3], [1, 4], [5], [6], [7]], rewards)
    assert not tree_td_advantages(*batch).any()


def test_an_unscorable_completion_counts_nowhere_and_gets_zero() -> None:
    batch = batch_of([[1, 2], [1, 3], [1, 4], [9]], [1.0, 0.0, NAN, NAN])
    alone = batch_of([[1, 2], [1, 3]], [1.0, 0.0])
    advantages = tree_td_advantages(*batch)
    assert torch.equal(advantages[:2], tree_td_advantages(*alone))
    assert not advantages[2:].any()
    assert not tree_td_advantages(*batch_of([[1], [2]], [NAN, NAN])).any()


def test_the_picture_is_what_the_library_computes() -> None:
    script = Path(__file__).parents[2] / "docs" / "figures" / "make_tempo.py"
    spec = importlib.util.spec_from_file_location("make_tempo", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    committed = script.with_name("tempo.svg").read_text(encoding="utf-8")
    assert module.picture() == committed, "run: python docs/figures/make_tempo.py"


# ---------------------------------------------------------------------------------------------- properties


@given(batches())
def test_values_are_those_of_the_reference(batch: Batch) -> None:
    torch.testing.assert_close(
        torch.from_numpy(ValueTree.build(*batch).states()), reference_states(*batch), rtol=0, atol=1e-14, equal_nan=True
    )


@given(batches())
def test_the_sum_over_a_completion_telescopes(batch: Batch) -> None:
    """Fact (i): one further reward minus mean, unless an equal or longer completion has another reward."""
    rewards, states = batch[0], reference_states(*batch)
    wanted = torch.where(rewards.isnan(), 0.0, states[:, -1] - states[:, 0])
    torch.testing.assert_close(differences(batch).sum(-1), wanted, rtol=0, atol=1e-13)


@given(batches(st.floats(-2, 2)))
def test_the_sum_over_a_node_is_zero(batch: Batch) -> None:
    """Fact (ii): credit is moved between the completions through a prefix that goes on, never created."""
    _, ids, mask, group = batch
    deltas, width = differences(batch), ids.shape[1]
    for column in range(width):
        for row in range(len(ids)):
            same = (ids[:, :column] == ids[row, :column]).all(-1) & (group == group[row])
            through = same & (mask.sum(-1) >= column)
            ending = through & (mask.sum(-1) == column)
            if mask[row].sum() >= column and not ending.any():
                assert deltas[through, column].sum().item() == pytest.approx(0.0, abs=1e-13)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_completions_that_share_nothing_have_twice_the_credit_on_their_first_token(rewards: list[float]) -> None:
    """Fact (iii)."""
    batch = batch_of([[token, 1, 1] for token in range(2, 2 + len(rewards))], rewards)
    plain = group_relative(batch[0], batch[3])
    advantages = tree_td_advantages(*batch)
    torch.testing.assert_close(advantages[:, 0], 2 * plain, rtol=1e-9, atol=1e-9)
    assert torch.equal(advantages[:, 1:], plain[:, None].expand(-1, 2))


@given(batches(st.sampled_from([0.1, 0.3, NAN])))
def test_equal_rewards_give_exactly_zero(batch: Batch) -> None:
    """Fact (iv), with means that binary fractions cannot hold."""
    rewards, *rest = batch
    equal = torch.where(rewards.isnan(), rewards, 0.1)
    assert not tree_td_advantages(equal, *rest).any()


@given(batches(), st.sampled_from(["group", "batch", "none"]))
def test_away_from_branches_it_is_grpo_to_the_bit(batch: Batch, scale: Any) -> None:
    rewards, ids, mask, group = batch
    plain = group_relative(rewards, group, scale_rewards=scale)[:, None].expand(ids.shape)
    advantages, deltas = tree_td_advantages(*batch, scale_rewards=scale), differences(batch)
    assert torch.equal(advantages[deltas == 0], plain[deltas == 0])
    assert not deltas[~mask].any()
    assert torch.equal(tree_td_advantages(*batch, scale_rewards=scale, coefficient=0.0), plain)
    # A token that every scored completion through the prefix before it takes is no branch.
    states = reference_states(*batch)
    assert ((states[:, 1:] - states[:, :-1]).abs()[(deltas == 0) & ~rewards.isnan()[:, None]] < 1e-14).all()


@given(batches())
def test_rloo_takes_the_differences_undivided(batch: Batch) -> None:
    expected = leave_one_out(batch[0], batch[3])[:, None] + 0.5 * differences(batch)
    assert torch.equal(tree_td_advantages(*batch, estimator="rloo", coefficient=0.5), expected)


@given(batches(), st.randoms(use_true_random=False))
def test_permuted_rows_have_permuted_credit(batch: Batch, random: Any) -> None:
    order = list(range(len(batch[0])))
    random.shuffle(order)
    permuted = tree_td_advantages(*(each[order] for each in batch))
    torch.testing.assert_close(permuted, tree_td_advantages(*batch)[order], rtol=0, atol=1e-12)


@given(batches(), st.integers(0, 2))
def test_padding_never_matches(batch: Batch, filler: int) -> None:
    """Neither more padding nor what stands in it: here tokens of the vocabulary, behind every completion."""
    rewards, ids, mask, group = batch
    wider = torch.cat([torch.where(mask, ids, filler), torch.full((len(ids), 2), filler)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros(len(ids), 2, dtype=torch.bool)], dim=1)
    padded = tree_td_advantages(rewards, wider, wide_mask, group)
    plain = tree_td_advantages(*batch)
    assert torch.equal(padded[:, : ids.shape[1]], plain)
    assert not differences((rewards, wider, wide_mask, group))[:, ids.shape[1] :].any()


@given(batches(st.floats(-2, 2)), st.floats(0.1, 5), st.floats(-3, 3))
def test_the_scale_of_rewards_does_not_matter(batch: Batch, factor: float, shift: float) -> None:
    rewards, *rest = batch
    moved = differences((rewards * factor + shift, *rest))
    torch.testing.assert_close(moved, factor * differences(batch), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_credited_is_refused() -> None:
    rewards, ids, mask, group = HAND
    with pytest.raises(InvalidBatchError, match=r"group 1 has one completion.*num_generations >= 2"):
        ValueTree.build(rewards, ids, mask, torch.tensor([0, 0, 0, 1]))
    with pytest.raises(InvalidBatchError, match="hole"):
        ValueTree.build(rewards, ids, mask.flip(1), group)
    with pytest.raises(InvalidBatchError, match=r"shapes \(4, 3\), \(3,\), \(4,\)"):
        ValueTree.build(rewards[:3], ids, mask, group)
    with pytest.raises(InvalidBatchError, match="must lie in"):
        ValueTree.build(rewards, ids - 3, mask, group)
    for coefficient in (-0.1, float("inf"), NAN):
        with pytest.raises(ValueError, match="tree_td_coef must be"):
            tree_td_advantages(*HAND, coefficient=coefficient)


def test_the_credit_follows_the_options() -> None:
    options = TrainerConfig(credit="rloo", scale_rewards="none")
    hooks = tempo.hooks(tempo.Config(tree_td_coef=0.3), Run(options=options, model=None, processing_class=None))
    assert hooks == {"credit": TreeCredit(estimator="rloo", scale_rewards="none", coefficient=0.3)}


def test_the_option_is_the_argument() -> None:
    default = inspect.signature(tree_td_advantages).parameters["coefficient"].default
    assert tempo.Config().tree_td_coef == TreeCredit().coefficient == default == 1.0


# ---------------------------------------------------------------------------------------------- in the trainer


def sampled_batch() -> RolloutBatch:
    rewards, ids, mask, group = HAND
    return RolloutBatch(
        prompt_ids=[[1]],
        group_id=group,
        completion_ids=ids,
        completion_mask=mask,
        truncated=torch.zeros(4, dtype=torch.bool),
        forced_len=torch.zeros(4, dtype=torch.int64),
        reward=rewards,
    )


@pytest.mark.parametrize("options", [{}, {"scale_rewards": "none"}, {"scale_rewards": "batch"}, {"estimator": "rloo"}])
def test_the_credit_of_the_trainer_is_the_function(options: dict[str, Any]) -> None:
    batch, off = sampled_batch(), TreeCredit(coefficient=0.0, **options)
    assert torch.equal(TreeCredit(**options)(batch), tree_td_advantages(*HAND, **options).float())
    assert torch.equal(off(batch), GroupCredit(**options)(batch)[:, None].expand(-1, 3))
    assert TreeCredit().metrics(batch) == ValueTree.build(*HAND).metrics()


def test_the_scale_of_a_batch_is_that_of_all_processes() -> None:
    batch, elsewhere = sampled_batch(), torch.tensor([5.0, -3.0], dtype=torch.float64)
    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=lambda rewards: torch.cat([rewards, elsewhere]))
    everyone = torch.cat([HAND[0], elsewhere])
    expected = tree_td_advantages(*HAND, scale_rewards="batch", all_rewards=everyone)
    assert torch.equal(TreeCredit(scale_rewards="batch", accelerator=accelerator)(batch), expected.float())
    assert not torch.equal(TreeCredit(scale_rewards="batch")(batch), expected.float())


# Low enough for a random model to repeat itself, high enough for branches behind the first token.
WARM = {"temperature": 0.25, "num_generations": 8}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "num_iterations": 2},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 3e-4},
    ],
    ids=["dapo", "grpo", "GSPO-token"],
)
def test_a_step_over_the_shared_forward_has_the_gradient_of_the_plain_one(
    make_trainer: Callable[..., Any], options: dict[str, Any]
) -> None:
    trainer = make_trainer(credit=TreeCredit(), compare_every=1, **WARM, **options)
    late = 0
    for _ in range(4):
        metrics = trainer.step()
        assert ("tree/branch_frac" in metrics) == ("reward" in metrics)  # logged with each generation
        assert metrics["compare/gradient_error"] < 1e-10
        assert metrics["compare/loss_plain"] == pytest.approx(metrics["compare/loss_shared"], abs=1e-12)
        batch = trainer._batch
        late += int((batch.advantages.diff(dim=1)[:, 1:].abs() > 1e-3)[batch.completion_mask[:, 2:]].sum())
    assert late > 3, "hardly anything branches behind the second token: the test compares GRPO with itself"


def test_without_its_coefficient_a_run_is_that_of_grpo_to_the_bit(make_trainer: Callable[..., Any]) -> None:
    plain, off = make_trainer(**WARM), make_trainer(credit=TreeCredit(coefficient=0.0), **WARM)
    on = make_trainer(credit=TreeCredit(), **WARM)
    for _ in range(3):
        for trainer in (plain, off, on):
            trainer.step()
    pairs = zip(plain.model.parameters(), off.model.parameters(), on.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two, _ in pairs)
    pairs = zip(plain.model.parameters(), off.model.parameters(), on.model.parameters(), strict=True)
    assert not all(torch.equal(one, three) for one, _, three in pairs), "the coefficient switches nothing"
