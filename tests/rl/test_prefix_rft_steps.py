"""Prefix-RFT in the trainer: whole steps in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rollouts import assert_equal_steps, rows_with_demonstrations, without_times
from stemma.data import diallock
from stemma.decode.rollout import LocalGenerator
from stemma.rl import grpo, tempo
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.prefix_rft import Config, hooks, prefix_length

Make = Callable[..., Any]


def dial_reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [diallock.reward(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)]


@pytest.fixture
def make(make_trainer: Make, make_model: Make) -> Make:
    """`make(Config(...), credit=..., **options of the trainer)`; without a Config plain GRPO on the same rows."""

    def build(config: Config | None = None, **options: Any) -> grpo.Trainer:
        options = {"prompts": rows_with_demonstrations, "max_completion_length": 32, "max_steps": 10, **options}
        names = ("rollout", "credit", "loss_mask", "reward_funcs", "prompts")
        arguments = {name: options.pop(name) for name in names if name in options}
        options |= {"credit": options.pop("credit_name")} if "credit_name" in options else {}
        model = make_model()
        if config is not None:
            defaults = {"num_generations": 4, "per_device_train_batch_size": 8}
            trainer_config = grpo.Config(**{**defaults, **options})
            given = arguments.pop("credit", None)
            tokenizer = diallock.tokenizer()
            run = grpo.Run(options=trainer_config, model=model, processing_class=tokenizer, credit=given)
            made = hooks(config, run)
            arguments = {**({} if given is None else {"credit": given}), **made, **arguments}
        return make_trainer(model, **options, **arguments)

    return build


class NeedsEntropies:
    """All tokens, after the same scoring pass that the entropy mask asks for."""

    needs_entropies = True

    def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
        return batch.completion_mask


NO_PREFIX = Config(prefix_ratio_low_start=0.0, prefix_ratio_low_end=0.0, prefix_ratio_high=0.0)


def test_without_a_prefix_it_is_grpo(make: Make) -> None:
    assert_equal_steps(make(NO_PREFIX), make(loss_mask=NeedsEntropies()))
    # Plain GRPO has no scoring pass: its ratio is exactly one, ours one up to the rounding of old log-probabilities.
    assert_equal_steps(make(NO_PREFIX), make(), tolerance=1e-5)


def test_quantile_zero_freezes_the_prefix_and_one_trains_on_all_of_it(make: Make) -> None:
    class Frozen(NeedsEntropies):
        def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
            return batch.sampled_mask

    assert_equal_steps(make(Config(entropy_quantile=0.0)), make(Config(), loss_mask=Frozen()))
    assert_equal_steps(make(Config(entropy_quantile=1.0)), make(Config(), loss_mask=NeedsEntropies()))


def test_the_switch_trains_on_exactly_a_fifth_of_the_forced_tokens(make: Make) -> None:
    counts = {}
    for quantile in (0.0, 0.2, 1.0):
        trainer = make(Config(entropy_quantile=quantile))
        optimised = trainer.step()["tokens/optimised"]
        batch = trainer._batch
        forced = int((batch.completion_mask & ~batch.sampled_mask).sum())
        assert forced == int(batch.forced_len.sum()) > 20
        counts[quantile] = optimised
    assert counts[0.2] - counts[0.0] == math.ceil(0.2 * forced)
    assert counts[1.0] - counts[0.0] == forced


def test_forced_tokens_are_those_of_the_demonstration(make: Make) -> None:
    trainer = make(Config())
    trainer.step()
    batch, rows = trainer._batch, rows_with_demonstrations(0, 2)
    assert batch.forced_len.view(2, 4)[:, :3].eq(0).all()
    for group, row in enumerate(rows):
        index = 4 * group + 3
        length = int(batch.forced_len[index])
        demonstration = row["demonstration_ids"]
        assert math.floor(0.95 * len(demonstration)) == length < len(demonstration)  # step 0 of the schedule
        assert batch.completion_ids[index, :length].tolist() == demonstration[:length]
    assert (batch.completion_mask.sum(-1) > batch.forced_len).all()


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "loss_type": "dr_grpo"}, {"loss_type": "grpo"}])
def test_shared_forward_and_accumulation_leave_a_step_alone(make: Make, options: dict[str, Any]) -> None:
    config = Config(prefix_ratio_low_start=0.3)
    assert_equal_steps(make(config, **options), make(config, shared_prefix=False, **options))
    assert_equal_steps(
        make(config, per_device_train_batch_size=8, **options),
        make(config, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options),
    )


def test_a_resumed_run_draws_the_same_prefixes(make: Make) -> None:
    whole, first, second = make(Config()), make(Config()), make(Config())
    expected = [whole.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for metrics in expected[2:]:
        assert without_times(second.step()) == without_times(metrics)


def logprob_of(trainer: grpo.Trainer, row: dict[str, Any]) -> Tensor:
    """Log-probabilities of the tokens of the demonstration."""
    ids = torch.tensor([row["prompt_ids"] + row["demonstration_ids"]])
    with torch.no_grad():
        logits = trainer.model(ids).logits.log_softmax(-1)[0, :-1]
    return logits.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]


@pytest.mark.parametrize("success", [True, False])
def test_a_prefix_that_verifies_is_pushed_up_and_one_that_does_not_is_pushed_down(make: Make, success: bool) -> None:
    (row,) = rows_with_demonstrations(3, 1)
    length = prefix_length(0.95, len(row["demonstration_ids"]))
    begins = row["demonstration_ids"][:length]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float((ids[:length] == begins) == success) for ids in completion_ids]

    trainer = make(
        Config(entropy_quantile=1.0),
        prompts=lambda generation, count: [row] * count,
        reward_funcs=reward,
        learning_rate=1e-3,
        num_generations=4,
        per_device_train_batch_size=4,
    )
    before = logprob_of(trainer, row)[:length].sum()
    metrics = trainer.step()
    after = logprob_of(trainer, row)[:length].sum()
    assert metrics["prefix_rft/reward_prefixed"] == float(success)
    assert metrics["prefix_rft/reward_free"] == float(not success)
    assert metrics["prefix_rft/prefix_length"] == length
    assert (after > before) == success


def test_the_verifier_judges_prefix_and_continuation_as_one_text(make: Make) -> None:
    seen: list[list[int]] = []

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return dial_reward(prompt_ids, completion_ids)

    trainer = make(Config(), reward_funcs=reward)
    trainer.step()
    assert seen == trainer._batch.completions()
    demonstrations = [row["demonstration_ids"] for row in rows_with_demonstrations(0, 2)]
    assert [seen[3][:10], seen[7][:10]] == [ids[:10] for ids in demonstrations]


def test_the_ratio_of_forced_tokens_is_against_the_old_policy(make: Make) -> None:
    trainer = make(Config(entropy_quantile=1.0), num_iterations=2, learning_rate=1e-2)
    first = trainer.step()
    second = trainer.step()  # the same batch: its ratios have moved away from one, prefixes included
    batch = trainer._batch
    assert batch.old_logprobs is not None
    forced = batch.completion_mask & ~batch.sampled_mask
    torch.testing.assert_close(batch.old_logprobs[forced], batch.sampling_logprobs[forced], rtol=0, atol=1e-5)
    assert first["clip_ratio/region_mean"] == 0.0 < second["clip_ratio/region_mean"]


def test_tree_credit_composes_and_credits_of_their_own_do_not(make: Make) -> None:
    trainer = make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit())
    trainer.step()
    assert trainer._batch.advantages.shape == trainer._batch.completion_ids.shape
    assert_equal_steps(
        make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit()),
        make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit(), shared_prefix=False),
    )
    with pytest.raises(ValueError, match="prefix_advantage='reference' is a credit of its own"):
        make(Config(prefix_advantage="reference"), credit=tempo.TreeCredit())
    with pytest.raises(ValueError, match="got credit='rloo'"):
        make(Config(prefix_advantage="reference"), credit_name="rloo")
    with pytest.raises(ValueError, match="two advantages in one row"):
        make(Config(prefix_advantage="reference"), importance_sampling_level="sequence")


def test_the_reference_advantage_reaches_the_step(make: Make) -> None:
    config = Config(prefix_advantage="reference")
    trainer = make(config, scale_rewards="none")
    assert_equal_steps(trainer, make(config, scale_rewards="none", shared_prefix=False))
    batch = trainer._batch
    hybrid = batch.forced_len > 0
    continued = batch.sampled_mask & hybrid[:, None]
    expected = batch.reward[:, None].expand_as(batch.advantages)[continued].float()
    assert torch.equal(batch.advantages[continued], expected)


@pytest.mark.parametrize(("prefixed", "advantage"), [(4, "group"), (3, "reference"), (5, "group")])
def test_a_group_without_enough_free_samples_is_refused(make: Make, prefixed: int, advantage: Any) -> None:
    with pytest.raises(ValueError, match=f"num_prefixed_generations={prefixed} leaves"):
        make(Config(num_prefixed_generations=prefixed, prefix_advantage=advantage))


def test_evaluation_never_sees_a_demonstration(make: Make) -> None:
    lengths: list[int] = []

    class Counted(LocalGenerator):
        def __call__(self, *arguments: Any, forced: Any = None, **options: Any) -> Any:
            lengths.extend(len(ids) for group in forced or [] for ids in group)
            return super().__call__(*arguments, forced=forced, **options)

    trainer = make(Config())
    trainer.collector.generate = partial(trainer._sample, Counted(eos_token_id=diallock.EOS_ID))
    trainer.evaluate(rows_with_demonstrations(9, 2))
    assert sum(lengths) == 0
    trainer.step()
    assert sum(lengths) > 20
