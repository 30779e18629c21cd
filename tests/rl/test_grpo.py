"""The trainer: equivalences of whole runs, in float64, and one test per switch that it switches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rl.conftest import diallock_prompts
from stemma.decode.rollout import LocalGenerator
from stemma.errors import InvalidBatchError, InvalidDataError, NonFiniteError
from stemma.rl.grpo import RolloutBatch, Trainer

Make = Callable[..., Trainer]
# What must not depend on how the same step is computed.
SAME = ("loss", "grad_norm", "entropy", "reward", "tokens/optimised", "tokens/sampled", "clip_ratio/region_mean")


def parameters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_run(one: Trainer, two: Trainer, steps: int = 3, tolerance: float = 1e-9) -> None:
    """Take steps with both and compare numbers and parameters."""
    for _ in range(steps):
        first, second = one.step(), two.step()
        for name in set(SAME) & set(first):
            assert second[name] == pytest.approx(first[name], rel=100 * tolerance, abs=tolerance), name
    before = parameters_of(two)
    for name, parameter in parameters_of(one).items():
        torch.testing.assert_close(
            before[name], parameter, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def equal_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.3] * len(completions)


def changed(before: dict[str, torch.Tensor], trainer: Trainer) -> list[str]:
    return [name for name, parameter in parameters_of(trainer).items() if not torch.equal(parameter, before[name])]


# ---------------------------------------------------------------------------------------------- equivalences

VARIANTS = [
    {},
    {"loss_type": "grpo", "num_iterations": 2, "epsilon": 1e-4, "epsilon_high": 2e-4},
    {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1, "entropy_coef": 0.01},
    {"loss_type": "cispo", "epsilon_high": 1.0, "num_iterations": 2, "mask_truncated_completions": True},
    {"importance_sampling_level": "sequence", "num_iterations": 2, "scale_rewards": "batch", "temperature": 0.7},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_shared_prefixes_train_like_the_plain_forward(make_trainer: Make, options: dict) -> None:
    assert_same_run(make_trainer(**options), make_trainer(shared_prefix=False, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_accumulation_does_not_change_the_run(make_trainer: Make, options: dict) -> None:
    whole = make_trainer(per_device_train_batch_size=16, **options)
    split = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    assert_same_run(whole, split)


def test_bnpo_is_the_loss_that_accumulation_changes(make_trainer: Make) -> None:
    whole = make_trainer(per_device_train_batch_size=16, loss_type="bnpo")
    split = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=4, loss_type="bnpo")
    assert whole.step()["grad_norm"] != pytest.approx(split.step()["grad_norm"], rel=1e-6)


def test_a_token_budget_does_not_change_the_run(make_trainer: Make) -> None:
    streamed = make_trainer(max_tokens=80)
    assert_same_run(make_trainer(), streamed)
    micro, _ = streamed._optimiser_batch(streamed._batch, 0)
    assert streamed.policy.backward(micro[0], "auto", 0.0)[1].mode == "streamed"


def test_gradient_checkpointing_does_not_change_the_run(make_trainer: Make) -> None:
    assert_same_run(make_trainer(), make_trainer(gradient_checkpointing=True), steps=2)


def test_a_mixture_of_experts_keeps_its_balancing_loss(make_trainer: Make, make_model: Callable) -> None:
    def moe() -> Any:
        return make_model("mixtral", torch.float32, num_local_experts=4, router_aux_loss_coef=0.5)

    assert_same_run(make_trainer(moe()), make_trainer(moe(), shared_prefix=False), steps=1, tolerance=1e-5)
    with_loss, without = make_trainer(moe()).step(), make_trainer(moe(), router_aux_loss_coef=0.0).step()
    assert with_loss["loss"] - without["loss"] > 0.1
    with pytest.raises(ValueError, match="has no router"):
        make_trainer(router_aux_loss_coef=0.1)


def test_resumed_is_bit_equal_to_uninterrupted_even_between_two_updates_of_a_batch(make_trainer: Make) -> None:
    options = {"num_iterations": 2, "steps_per_generation": 2, "lr_scheduler_type": "linear", "warmup_steps": 2}
    whole, first = make_trainer(**options), make_trainer(**options)
    rows = [whole.step() for _ in range(6)]
    for _ in range(3):
        first.step()
    second = make_trainer(**options)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for expected in rows[3:]:
        got = second.step()
        assert {k: v for k, v in got.items() if "time" not in k} == {
            k: v for k, v in expected.items() if "time" not in k
        }
    assert changed(parameters_of(whole), second) == []


# ---------------------------------------------------------------------------------------------- switches


def test_sharing_encodes_fewer_tokens_and_counts_three_kinds_apart(make_trainer: Make) -> None:
    shared, plain = make_trainer().step(), make_trainer(shared_prefix=False).step()
    assert shared["tokens/without_sharing"] == plain["tokens/without_sharing"]
    assert shared["tokens/forwarded"] < 0.5 * shared["tokens/without_sharing"] <= 0.5 * plain["tokens/forwarded"]
    assert shared["tokens/optimised"] == shared["tokens/sampled"] == plain["tokens/sampled"] <= 8 * 12


def test_off_policy_updates_clip_and_on_policy_ones_do_not(make_trainer: Make) -> None:
    trainer = make_trainer(num_iterations=2, epsilon=1e-4, learning_rate=1e-2)
    first, second = trainer.step(), trainer.step()
    assert first["clip_ratio/region_mean"] == 0.0
    assert second["clip_ratio/region_mean"] > 0.1
    assert "reward" in first
    assert "reward" not in second  # nothing was sampled
    assert second["sampling/sampling_logp_difference/max"] < 1e-5  # against the policy that sampled


def test_sampler_and_trainer_agree_on_log_probabilities(make_trainer: Make) -> None:
    assert make_trainer(temperature=0.6).step()["sampling/sampling_logp_difference/max"] < 1e-5
    options = {"temperature": 0.6, "generator": LocalGenerator(eos_token_id=1, temperature=1.0)}
    skewed = make_trainer(**options, importance_sampling_correction=True)
    assert skewed.step()["sampling/sampling_logp_difference/mean"] > 1e-3
    with pytest.raises(ValueError, match=r"samples at temperature 1.0 and the trainer scores at 0.6"):
        make_trainer(**options)


def test_equal_rewards_change_no_parameter(make_trainer: Make) -> None:
    trainer = make_trainer(reward_funcs=equal_reward)
    before = parameters_of(trainer)
    metrics = trainer.step()
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["grad_norm"] == 0.0
    assert changed(before, trainer) == []


def test_unscorable_completions_get_no_gradient(make_trainer: Make) -> None:
    def mostly_unscorable(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, 0.0, None, None] * (len(completions) // 4)

    trainer = make_trainer(reward_funcs=mostly_unscorable)
    metrics = trainer.step()
    assert trainer._batch.advantages.view(2, 4)[:, 2:].abs().max() == 0.0
    assert trainer._batch.advantages.view(2, 4)[:, :2].abs().min() > 0.5
    assert metrics["reward"] == 0.5


def test_truncated_completions_leave_the_loss(make_trainer: Make) -> None:
    options = {"max_completion_length": 1}
    assert make_trainer(**options).step()["grad_norm"] > 0
    masked = make_trainer(**options, mask_truncated_completions=True)
    metrics = masked.step()
    assert metrics["completions/clipped_ratio"] > 0.5
    assert metrics["tokens/optimised"] == metrics["tokens/sampled"] * (1 - metrics["completions/clipped_ratio"])


def test_the_kl_term_pulls_towards_the_reference(make_trainer: Make, make_model: Callable) -> None:
    own = make_trainer(beta=1.0)
    assert own.step()["kl"] == pytest.approx(0.0, abs=1e-12)  # the reference is the model as it was
    assert own.step()["kl"] > 1e-9
    assert all(not p.requires_grad for p in own.ref_model.parameters())
    options = {"reward_funcs": equal_reward, "learning_rate": 1e-2, "per_device_train_batch_size": 64}
    trainer = make_trainer(beta=1.0, ref_model=make_model(initializer_range=0.2, seed=1), **options)
    kl = [trainer.step()["kl"] for _ in range(6)]
    assert kl[-1] < 0.7 * kl[0]


def test_an_adapter_trains_alone_and_its_base_is_the_reference(make_trainer: Make, make_model: Callable) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: pip install 'stemma-lm[peft]'")

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(make_model(), config)

    trainer = make_trainer(adapted(), beta=0.1)
    before = parameters_of(trainer)
    assert trainer.step()["kl"] > 1e-4  # the adapter starts away from zero
    assert trainer.ref_model is None
    assert changed(before, trainer) == [name for name in before if "lora" in name]
    assert_same_run(make_trainer(adapted(), beta=0.1), make_trainer(adapted(), beta=0.1, shared_prefix=False), steps=2)


def test_training_raises_the_reward(make_trainer: Make) -> None:
    def few_distinct_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0 - len(set(ids)) / 12 for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=few_distinct_tokens, learning_rate=1e-2, num_generations=8, per_device_train_batch_size=32
    )
    rewards = [trainer.step()["reward"] for _ in range(12)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


# ---------------------------------------------------------------------------------------------- the four places


def test_a_method_brings_its_own_prompts_rollout_credit_and_mask(make_trainer: Make) -> None:
    seen: dict[str, Any] = {}

    def rollout(generate: Any, rows: Any, num_generations: int, seeds: list[int], step: int) -> RolloutBatch:
        seen["rows"] = [row["prompt_ids"] for row in rows]
        ids = torch.arange(len(rows) * num_generations * 5).view(-1, 5) % 19 + 2
        size = len(ids)
        return RolloutBatch(
            prompt_ids=seen["rows"],
            group_id=torch.arange(len(rows)).repeat_interleave(num_generations),
            completion_ids=ids,
            completion_mask=torch.ones(size, 5, dtype=torch.bool),
            truncated=torch.zeros(size, dtype=torch.bool),
            forced_len=torch.full((size,), 2),
        )

    def credit(batch: RolloutBatch) -> torch.Tensor:
        return torch.linspace(-1, 1, batch.completion_ids.numel()).view(batch.completion_ids.shape)

    class LeastCertain:
        needs_entropies = True

        def __call__(self, batch: RolloutBatch, step: int) -> torch.Tensor:
            seen["entropies"] = batch.entropies
            return batch.entropies >= batch.entropies.median()

    trainer = make_trainer(
        prompts=lambda generation, count: [{"prompt_ids": [3, 4, 5 + i]} for i in range(count)],
        rollout=rollout,
        credit=credit,
        loss_mask=LeastCertain(),
    )
    metrics = trainer.step()
    assert seen["rows"] == [[3, 4, 5], [3, 4, 6]]
    assert (seen["entropies"] > 0).all()
    assert metrics["tokens/sampled"] == 8 * 3  # two of five tokens were forced
    assert metrics["tokens/optimised"] == (seen["entropies"] >= seen["entropies"].median()).sum() < 30
    assert "sampling/sampling_logp_difference/mean" not in metrics  # this rollout gave no log-probabilities
    assert metrics["grad_norm"] > 0


def test_bad_parts_are_refused(make_trainer: Make) -> None:
    with pytest.raises(InvalidDataError, match="returned 1 rows, expected 2"):
        make_trainer(prompts=lambda generation, count: [{"prompt_ids": [1]}]).step()
    with pytest.raises(InvalidBatchError, match="credit function returned"):
        make_trainer(credit=lambda batch: torch.full((len(batch),), torch.nan)).step()
    with pytest.raises(ValueError, match="one entry per reward function"):
        make_trainer(reward_weights=[1.0, 2.0])
    with pytest.raises(InvalidDataError, match="returned nan for sample 0"):
        make_trainer(reward_funcs=lambda completions, **_: [float("nan")] * len(completions)).step()


def test_a_diverged_step_is_not_taken(make_trainer: Make) -> None:
    trainer = make_trainer()
    before = parameters_of(trainer)
    trainer.model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient norm of step 1"):
        trainer.step()
    assert changed(before, trainer) == []


def test_evaluation_trains_nothing_and_repeats(make_trainer: Make) -> None:
    trainer = make_trainer()
    before, state = parameters_of(trainer), torch.get_rng_state()
    rows = diallock_prompts(99, 5)
    first = trainer.evaluate(rows)
    assert first == trainer.evaluate(rows)
    assert 0 < first["eval/reward"] < first["eval/reward_best"] <= 1
    assert changed(before, trainer) == []
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------- what is encoded


class FirstTokens:
    """Trains on the first two tokens of every row but the first of each group, and counts all tokens of the others."""

    def __call__(self, batch: RolloutBatch, step: int) -> torch.Tensor:
        columns = torch.arange(batch.completion_ids.shape[1])
        first = torch.cat([torch.tensor([True]), batch.group_id.diff() > 0])
        return (columns < 2) & ~first[:, None]


@pytest.mark.parametrize("mode", [{}, {"shared_prefix": False}, {"max_tokens": 80}], ids=str)
def test_only_what_is_trained_on_is_encoded(make_trainer: Make, mode: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"loss_mask": FirstTokens(), "num_iterations": 2, "beta": 0.1, **mode}
    cut = make_trainer(**options)
    cut_steps = [cut.step() for _ in range(2)]
    batch = cut._batch
    assert batch is not None
    prompt_tokens, trained_tokens = sum(len(ids) for ids in batch.prompt_ids), 2 * 6
    assert cut_steps[0]["tokens/without_sharing"] == 4 * prompt_tokens + trained_tokens
    if mode == {}:
        assert cut_steps[0]["tokens/forwarded"] <= prompt_tokens + trained_tokens
    whole = make_trainer(**options)
    tree = RolloutBatch.tree
    monkeypatch.setattr(RolloutBatch, "tree", lambda self, trained_only=False: tree(self))
    for fewer, more in zip(cut_steps, [whole.step() for _ in range(2)]):
        assert fewer["tokens/forwarded"] < more["tokens/forwarded"]
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert fewer[name] == pytest.approx(more[name], rel=1e-9), name


def test_a_mask_may_count_more_tokens_than_it_trains_on(make_trainer: Make) -> None:
    class CountsAll(FirstTokens):
        def normaliser(self, batch: RolloutBatch) -> torch.Tensor:
            return batch.completion_mask

    one, all_tokens = make_trainer(loss_mask=FirstTokens()), make_trainer(loss_mask=CountsAll())
    small, large = one.step()["grad_norm"], all_tokens.step()["grad_norm"]
    batch = all_tokens._batch
    assert batch is not None
    assert small / large == pytest.approx(int(batch.completion_mask.sum()) / int(batch.loss_mask.sum()), rel=1e-9)


# ---------------------------------------------------------------------------------------------- hooks with a state


class Counter:
    """A rollout that counts its calls and evaluations."""

    def __init__(self) -> None:
        self.calls, self.evaluations = 0, 0

    def __call__(self, generate: Any, rows: Any, num_generations: int, seeds: list[int], step: int) -> RolloutBatch:
        self.calls += 1
        return generate([row["prompt_ids"] for row in rows], num_generations, seeds)

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        return {"rollout/calls": float(self.calls)}

    def on_evaluate(self, metrics: dict[str, float]) -> None:
        self.evaluations += 1

    def state_dict(self) -> dict[str, int]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def test_a_hook_with_a_state_is_logged_told_and_restored(make_trainer: Make) -> None:
    trainer = make_trainer(rollout=Counter())
    assert [trainer.step()["rollout/calls"] for _ in range(2)] == [1.0, 2.0]
    trainer.evaluate([{"prompt_ids": [3, 4, 5]}])
    resumed = make_trainer(rollout=Counter())
    resumed.load_state_dict(trainer.state_dict())
    assert vars(resumed.collector.rollout) == {"calls": 2, "evaluations": 1}


# ---------------------------------------------------------------------------------------------- prefixed prompts


def test_rewards_see_the_prefix_as_the_beginning_of_the_completion(make_trainer: Make) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list, completions: list, prompt_ids: list, completion_ids: list, **_: Any) -> list[float]:
        seen.update(prompt_ids=prompt_ids, completion_ids=completion_ids, prompts=prompts, completions=completions)
        return [float(len(set(ids))) for ids in completion_ids]

    row = {"prompt_ids": [3, 4, 5, 6, 7], "prefix_ids": [6, 7]}
    trainer = make_trainer(prompts=lambda generation, count: [row] * count, reward_funcs=reward)
    trainer.step()
    assert {tuple(ids) for ids in seen["prompt_ids"]} == {(3, 4, 5)}
    assert {tuple(ids[:2]) for ids in seen["completion_ids"]} == {(6, 7)}
    assert trainer._batch.completions() == [ids[2:] for ids in seen["completion_ids"]]
    assert all(prompt == "123" and text.startswith("45") for prompt, text in zip(seen["prompts"], seen["completions"]))
    with pytest.raises(InvalidDataError, match="evaluation row 1 has prefix_ids"):
        trainer.evaluate([{"prompt_ids": [3]}, row])
    broken = make_trainer(prompts=lambda generation, count: [{**row, "prefix_ids": [5, 7]}] * count)
    with pytest.raises(InvalidDataError, match="not the tail of the row's 5 prompt_ids"):
        broken.step()
