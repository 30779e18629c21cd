"""TRL's trainer with tree credit and with prompts as token ids: stock TRL, our own losses and fixed completions."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stemma.data import diallock
from stemma.data.traces import Trace
from stemma.errors import InvalidDataError, StemmaError
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.prefix.values import ValueTree
from stemma.rl import pppo, tempo
from stemma.rl import trl as adapter
from stemma.rl.engine.losses import token_loss, token_weights
from stemma.rl.prefix_rl import build_prefixed_problems
from stemma.rl.tempo import tree_td_advantages

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

EOS = 256
# Two groups of four: a late branch, a completion cut off where another goes on, two equal ones; then other tokens.
COMPLETIONS = [[*b"aab", EOS], [*b"aac", EOS], [*b"aa"], [*b"aab", EOS]]
COMPLETIONS += [[*b"xy", EOS], [*b"xyz", EOS], [*b"xw", EOS], [*b"aab"]]
REWARDS: list[float | None] = [1.0, 0.0, 0.3, 0.5, None, 0.7, 0.0, 0.0]


def fixed_reward(completions: list[str], **_: Any) -> list[float | None]:
    return REWARDS[: len(completions)]


def reward_vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(completion.count(vowel) for vowel in "aeiou") - 0.01 * len(completion) for completion in completions]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """`build(trainer class, reward function, rows, **options)`; options of the trainer's constructor are in `own`."""
    numbers = itertools.count()

    def build(
        kind: type,
        reward: Any = fixed_reward,
        rows: Any = ({"prompt": "Add:"}, {"prompt": "Count the letters:"}),
        *,
        tokenizer: Any = None,
        own: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        import trl
        from datasets import Dataset

        settings = {
            **{"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8},
            **{"learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1},
            **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            **{"bf16": False, "gradient_checkpointing": False, "shuffle_dataset": False},
            "beta": 0.0,  # RLOO's default would load a reference model by its name
            "seed": 7,
        }
        tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        config_class = trl.RLOOConfig if issubclass(kind, trl.RLOOTrainer) else trl.GRPOConfig
        torch.manual_seed(3)
        return kind(
            model=tiny_model("llama", hidden_size=32, num_attention_heads=2, vocab_size=len(tokenizer)),
            reward_funcs=reward,
            args=config_class(output_dir=str(tmp_path / str(next(numbers))), **{**settings, **options}),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            **(own or {}),
        )

    return build


def tree_credit(coefficient: float) -> dict[str, Any]:
    return {"credit": partial(tempo.hooks, tempo.Config(tree_td_coef=coefficient))}


def with_fixed_completions(trainer: Any) -> Any:
    def turn(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        ids = COMPLETIONS[: len(prompt_ids)]
        return (ids, None) if hasattr(trainer.args, "loss_type") else ids  # RLOO returns no log-probabilities

    trainer._generate_single_turn = turn
    trainer.model.train()
    return trainer


def generated(trainer: Any) -> dict[str, Any]:
    """A generation batch before it is shuffled."""
    rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows[: trainer.args.generation_batch_size])


def fixed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(ids) for ids in COMPLETIONS])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in COMPLETIONS], batch_first=True)
    rewards = torch.tensor([float("nan") if r is None else r for r in REWARDS], dtype=torch.float64)
    return rewards, ids, torch.arange(ids.shape[1]) < lengths[:, None], torch.arange(8) // 4


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls_plus_the_differences(build: Callable[..., Any], scale: str) -> None:
    import trl

    options = {"scale_rewards": scale}
    stock = generated(with_fixed_completions(build(trl.GRPOTrainer, **options)))["advantages"]
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(0.5), **options))
    advantages = generated(trainer)["advantages"]
    expected = tree_td_advantages(*fixed_batch(), scale_rewards=scale, coefficient=0.5)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-6)

    tree = ValueTree.build(*fixed_batch())
    still = torch.from_numpy(tree.differences()) == 0
    assert 0.1 < still.double().mean() < 0.9
    assert torch.equal(advantages[still], stock[:, None].expand_as(advantages)[still])
    assert {name: trainer._metrics["train"][name] for name in tree.metrics()} == {
        name: [value] for name, value in tree.metrics().items()
    }


def test_rewards_of_other_processes_only_scale(build: Callable[..., Any]) -> None:
    """TRL gathers rewards: those of this process are cut out of them, and the batch's deviation is that of all."""
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(1.0), scale_rewards="batch"))
    output = generated(trainer)
    per_function, lengths = trainer._scored
    elsewhere = torch.full_like(per_function, 5.0)
    trainer._scored = torch.cat([elsewhere, per_function]), lengths
    both = SimpleNamespace(process_index=1, num_processes=2, device="cpu")
    both.gather = lambda own: torch.cat([elsewhere.flatten().double(), own])
    trainer.accelerator = both
    trainer._credit, trainer._row_credit = (
        dataclasses.replace(credit, accelerator=both) for credit in (trainer._credit, trainer._row_credit)
    )
    output["advantages"] = torch.zeros(8)
    differences = torch.from_numpy(ValueTree.build(*fixed_batch()).differences())
    scored = torch.cat([elsewhere, per_function]).flatten()
    std = scored[~scored.isnan()].double().std()
    torch.testing.assert_close(trainer._token_credit(output).double(), differences / (std + 1e-4), rtol=1e-5, atol=1e-6)


def test_a_coefficient_of_zero_is_stock_trl_to_the_bit(build: Callable[..., Any]) -> None:
    import trl

    stock = generated(with_fixed_completions(build(trl.GRPOTrainer)))
    off = generated(with_fixed_completions(build(adapter.GRPOTrainer)))
    zero = generated(with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(0.0))))
    assert torch.equal(off["advantages"], stock["advantages"])
    assert torch.equal(zero["advantages"], stock["advantages"][:, None].expand(-1, 4))


def test_masked_truncated_completions_stay_in_the_tree(build: Callable[..., Any]) -> None:
    """They are not trained on, but what they earned is still evidence about their beginnings."""
    options = {"mask_truncated_completions": True}
    output = generated(with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(1.0), **options)))
    assert output["completion_mask"].sum(1).tolist() == [4, 4, 0, 4, 3, 4, 3, 0]
    expected = tree_td_advantages(*fixed_batch())
    torch.testing.assert_close(output["advantages"].double(), expected, rtol=1e-5, atol=1e-6)


def test_advantages_travel_with_their_completions(build: Callable[..., Any]) -> None:
    """Through TRL's shuffle, the dealing of whole groups and the cut into slices."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(1.0), **options))
    trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(4)])
    expected = tree_td_advantages(*fixed_batch()).float()
    known = {(row // 4, tuple(ids)): expected[row] for row, ids in enumerate(COMPLETIONS)}
    seen = 0
    prompts = [len("Add:"), len("Count the letters:")]
    for part in trainer._buffered_inputs:
        for ids, mask, prompt, advantages in zip(
            part["completion_ids"], part["completion_mask"], part["prompt_mask"], part["advantages"], strict=True
        ):
            key = (prompts.index(int(prompt.sum())), tuple(ids[mask.bool()].tolist()))
            if key != (0, tuple(COMPLETIONS[0])):  # which row 3 repeats with another reward
                torch.testing.assert_close(advantages, known[key], rtol=1e-5, atol=1e-6)
                seen += 1
    assert seen == 6


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_and_gradient(trainer: Any, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_the_loss_is_that_of_our_own_trainer(build: Callable[..., Any], loss_type: Any) -> None:
    """The same batch with an older policy behind it, so that ratios clip on both sides."""
    epsilon_high = 1.0 if loss_type == "cispo" else 0.28
    options: dict[str, Any] = {"loss_type": loss_type, "epsilon_high": epsilon_high}
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(1.0), **options))
    trainer.current_gradient_accumulation_steps = 1
    batch = generated(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    old = logprobs.detach() + 0.3 * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    ours, kept = fixed_batch(), batch["completion_mask"].bool()
    loss = token_loss(logprobs, old, tree_td_advantages(*ours).float(), kept, **options).loss
    weights = token_weights(kept, loss_type, num_sequences=8, num_tokens=int(kept.sum()), max_completion_length=8)
    expected, gradient = loss_and_gradient(trainer, (loss * weights).sum())
    found, own = loss_and_gradient(trainer, trainer.compute_loss(trainer.model, {**batch, "old_per_token_logps": old}))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert (own - gradient).norm() < 1e-4 * gradient.norm()


def run(trainer: Any) -> list[float]:
    torch.manual_seed(5)
    trainer.train()
    return [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "luspo"])
def test_a_run_with_the_coefficient_zero_is_stock_and_with_one_is_not(
    build: Callable[..., Any], loss_type: str
) -> None:
    import trl

    options = {"reward": reward_vowels, "loss_type": loss_type, "num_iterations": 2, "top_k": 2}
    stock = run(build(trl.GRPOTrainer, **options))
    assert run(build(adapter.GRPOTrainer, own=tree_credit(0.0), **options)) == pytest.approx(stock, rel=1e-4)
    credited = build(adapter.GRPOTrainer, own=tree_credit(1.0), **options)
    assert run(credited)[0] != pytest.approx(stock[0], rel=1e-2)
    assert any("tree/branch_frac" in row for row in credited.state.log_history)


def test_evaluation_has_tree_credit_too(build: Callable[..., Any]) -> None:
    trainer = build(adapter.GRPOTrainer, reward_vowels, own=tree_credit(1.0), per_device_eval_batch_size=8)
    trainer.evaluate(trainer.train_dataset)
    assert "eval_tree/branch_frac" in trainer.state.log_history[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level to be token"),
        ({"loss_type": "vespo"}, "loss_type to be one of grpo"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold to be None"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation to be sum_then_normalize"),
        ({"num_generations_eval": 1}, "num_generations_eval must be at least 2"),
    ],
)
def test_options_that_undo_it_are_refused(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    build(adapter.GRPOTrainer, **options)
    with pytest.raises(StemmaError, match=message):
        build(adapter.GRPOTrainer, own=tree_credit(1.0), **options)


def test_rloo_and_more_than_a_credit_are_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(StemmaError, match="does not go with RLOOTrainer"):
        build(adapter.RLOOTrainer, own=tree_credit(1.0))
    with pytest.raises(StemmaError, match="nothing else, it gives credit, loss_mask, rollout"):
        build(adapter.GRPOTrainer, own={"credit": partial(pppo.hooks, pppo.Config())})


def test_a_group_that_is_not_together_is_refused(build: Callable[..., Any]) -> None:
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, own=tree_credit(1.0)))
    with pytest.raises(StemmaError, match="4 completions of a prompt side by side"):
        trainer._generate_and_score_completions([*trainer.train_dataset] * 4)


# --- prompts as token ids ---------------------------------------------------------------------------------------------

# No UTF-8: decoded and tokenized again, these would be other tokens.
QUESTION, PREFIX = [65, 200, 201, 66], [250, 97]
ROWS = (
    {"prompt_ids": QUESTION + PREFIX, "prefix_ids": PREFIX, "difficulty": 3},
    {"prompt_ids": QUESTION, "prefix_ids": None, "difficulty": 4},
)


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_token_ids_reach_the_model_and_rewards_see_the_whole_answer(build: Callable[..., Any], name: str) -> None:
    seen: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return [float(len(ids)) for ids in columns["completion_ids"]]

    trainer = with_fixed_completions(build(getattr(adapter, name), reward, ROWS))
    batch = generated(trainer)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    assert prompts == [QUESTION + PREFIX] * 4 + [QUESTION] * 4
    kept = batch["completion_mask"].bool()
    sampled = [ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], kept, strict=True)]
    assert sampled == COMPLETIONS, "the prefix is trained on"

    decode = byte_tokenizer().decode
    (columns,) = seen
    whole = [PREFIX + ids for ids in COMPLETIONS[:4]] + COMPLETIONS[4:]
    assert columns["completion_ids"] == whole
    assert columns["completions"] == [decode(ids, skip_special_tokens=True) for ids in whole]
    assert columns["prompt_ids"] == [QUESTION] * 8
    assert columns["prompts"] == [decode(QUESTION)] * 8
    assert columns["prefix_ids"] == [PREFIX] * 4 + [None] * 4
    assert columns["difficulty"] == [3] * 4 + [4] * 4


def test_the_text_of_a_prompt_is_kept_where_there_is_one(build: Callable[..., Any]) -> None:
    """Conversational prompts too: the completion is then a message of the assistant."""
    seen: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return [0.0] * len(columns["prompts"])

    message = [{"role": "user", "content": "How?"}]
    trainer = with_fixed_completions(
        build(adapter.GRPOTrainer, reward, [{**ROWS[0], "prompt": message}], per_device_train_batch_size=4)
    )
    generated(trainer)
    assert seen[0]["prompts"] == [message] * 4
    expected = byte_tokenizer().decode(PREFIX + COMPLETIONS[0], skip_special_tokens=True)
    assert seen[0]["completions"][0] == [{"role": "assistant", "content": expected}]


def test_columns_survive_the_removal_of_unused_ones(build: Callable[..., Any]) -> None:
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, fixed_reward, ROWS, remove_unused_columns=True))
    rows = next(iter(trainer.get_train_dataloader()))
    assert rows[0].keys() == {"prompt_ids", "prefix_ids"}


def test_prefix_rl_with_tree_credit_trains(build: Callable[..., Any]) -> None:
    """The rows and the verifier of our own trainer, unchanged; the trace's own ending earns the reward."""
    rng = Random(0)
    drawn = diallock.draw_problems(diallock.problems("train", min_distance=3, max_distance=5), 2, rng)
    solved = {
        tuple(episode.prompt_ids): episode.completion_ids
        for episode in (diallock.oracle_episode(problem, rng) for problem in drawn)
    }
    unknown = {"text": None, "source": "oracle", "samples": 1, "tokens": 1, "flops": 0.0, "columns": {}}
    traces = [Trace(prompt_ids=list(prompt), trace_ids=ids, verified=True, **unknown) for prompt, ids in solved.items()]
    problems = build_prefixed_problems(traces, cuts_per_problem=1)
    assert ["prefix_ids" in row for row in problems] == [True, False] * 2

    def half_solved(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        answers = []
        for index, ids in enumerate(prompt_ids):
            rest = solved[tuple(ids[:6])][len(ids) - 6 :]
            answers.append(rest if index % 2 else rest[:-1])
        return answers, None

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [diallock.reward(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)]

    options = {"per_device_train_batch_size": 16, "max_completion_length": 40, "tokenizer": diallock.tokenizer()}
    trainer = build(adapter.GRPOTrainer, reward, problems, own=tree_credit(1.0), **options)
    trainer._generate_single_turn = half_solved
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["reward"] for row in log] == pytest.approx([0.5] * 3)
    assert not all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_ids": [1, 2, 3], "prefix_ids": [2]}], "not the tail"),
        ([{"prompt_ids": [1, 2], "prefix_ids": [1, 2]}], "not the tail"),
        ([{"prompt": "Add:", "prefix_ids": [2]}], "prefix_ids without prompt_ids"),
        ([{"prompt": "Add:", "prompt_ids": [1]}, {"prompt": "Add:", "prompt_ids": None}], "some rows have prompt_ids"),
        ([{"prompt_ids": [1, 400]}], "vocabulary of 258"),
        ([{"prompt_ids": []}], "at least one id"),
    ],
)
def test_bad_rows_are_refused(build: Callable[..., Any], rows: list[dict[str, Any]], message: str) -> None:
    trainer = with_fixed_completions(build(adapter.GRPOTrainer, rows=rows, per_device_train_batch_size=4 * len(rows)))
    with pytest.raises(InvalidDataError, match=message):
        generated(trainer)


def test_evaluation_refuses_prefixes(build: Callable[..., Any]) -> None:
    trainer = build(adapter.GRPOTrainer, reward_vowels, ROWS, per_device_eval_batch_size=8)
    with pytest.raises(InvalidDataError, match="evaluated on problems without a prefix"):
        trainer.evaluate(trainer.train_dataset)
    trainer.evaluate(trainer.train_dataset.select([1, 1]))


def test_a_rollout_function_does_not_go_with_token_ids(build: Callable[..., Any]) -> None:
    trainer = build(adapter.GRPOTrainer, rows=ROWS, own={"rollout_func": lambda prompts, trainer: {}})
    trainer.model.train()
    with pytest.raises(StemmaError, match="rollout_func makes prompts of its own"):
        generated(trainer)
