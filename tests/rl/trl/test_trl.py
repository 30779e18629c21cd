"""The TRL trainers over shared prefixes against stock TRL: same batch, same loss, same gradients, fewer tokens.

Models are float32, as TRL's log-probabilities are; "equal" means equal to the rounding of float32.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stemma.errors import StemmaError, UnsupportedModelError
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.rl import trl as adapter

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

EOS, PAD = 256, 257
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 258}
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
PROMPTS = (
    "Count the letters of every word below, one per line, and stop:",
    "Add the two numbers:",
    "Name a colour that is not in this list: red, green, blue, black.",
    "Say it again, backwards:",
)


def reward_vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between almost any two random completions."""
    return [sum(completion.count(vowel) for vowel in "aeiou") - 0.01 * len(completion) for completion in completions]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A folder with a tiny checkpoint per model type: TRL loads the reference model by name."""
    made: dict[str, str] = {}

    def folder(model_type: str = "llama", **options: Any) -> str:
        key = model_type + repr(sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type, **{**SIZES, **options}).save_pretrained(path)
            byte_tokenizer().save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return folder


@pytest.fixture
def build(model_folder: Callable[..., str], tmp_path: Path) -> Callable[..., Any]:
    """Builds a trainer of the given class on a fresh copy of the same weights."""
    numbers = itertools.count()

    def build(
        trainer_class: type,
        model_type: str = "llama",
        model_options: dict[str, Any] | None = None,
        trainer_options: dict[str, Any] | None = None,
        model: Any = None,
        **options: Any,
    ) -> Any:
        import trl
        from datasets import Dataset
        from transformers import AutoModelForCausalLM

        config_class = trl.RLOOConfig if issubclass(trainer_class, trl.RLOOTrainer) else trl.GRPOConfig
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": 7,
        }
        args = config_class(output_dir=str(tmp_path / str(next(numbers))), **{**settings, **options})
        if model is None:
            folder = model_folder(model_type, **(model_options or {}))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return trainer_class(
            model=model,
            reward_funcs=reward_vowels,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
            processing_class=byte_tokenizer(),
            **(trainer_options or {}),
        )

    return build


def make_batch(groups: int = 2, size: int = 4, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """A slice as TRL buffers it: left-padded prompts of unequal length, right-padded completions, one of them full."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator)

    lengths = [29, 17, 23, 12][:groups]
    longest = max(lengths)
    prompt_ids = torch.full((groups * size, longest), PAD)
    prompt_mask = torch.zeros(groups * size, longest, dtype=torch.long)
    for group, length in enumerate(lengths):
        rows = slice(group * size, (group + 1) * size)
        prompt_ids[rows, longest - length :] = draw(length)
        prompt_mask[rows, longest - length :] = 1
    completion_ids = draw(groups * size, width)
    kept = torch.tensor(([width, 3, width - 1, 1] * groups * size)[: groups * size])
    completion_mask = (torch.arange(width) < kept[:, None]).long()
    completion_ids = torch.where(completion_mask.bool(), completion_ids, PAD)
    ends = (kept < width).nonzero()[:, 0]
    completion_ids[ends, kept[ends] - 1] = EOS
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.randn(groups * size, generator=generator),
        "num_items_in_batch": completion_mask.sum(),
    }


def with_past(trainer: Any, batch: dict[str, Any], reference: bool = False) -> dict[str, Any]:
    """Adds log-probabilities of an older policy (and a reference) near the present ones: both sides of the clip."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logps = score_with(trainer, batch)[0]

    def near(spread: float) -> torch.Tensor:
        return logps + spread * torch.randn(logps.shape, generator=generator)

    batch = {**batch, "old_per_token_logps": near(0.3), "old_logps": (near(0.05) * batch["completion_mask"]).sum(1)}
    return {**batch, "ref_per_token_logps": near(0.3)} if reference else batch


def score_with(trainer: Any, batch: dict[str, Any], **options: Any) -> tuple[torch.Tensor, Any, Any]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    keep = batch["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, **options)


def count_embedded(model: Any) -> list[int]:
    """A list that grows by the number of tokens of each forward from here on."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    return counts


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_update(stock: Any, shared: Any, batch: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Loss and every parameter's gradient agree, relative to the largest entry of that gradient."""
    (expected_loss, expected), (loss, gradients) = loss_and_gradients(stock, batch), loss_and_gradients(shared, batch)
    assert loss == pytest.approx(expected_loss, rel=tolerance, abs=1e-6)
    assert gradients.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values()), "the batch has no gradient to compare"
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp(min=1e-7)
        error = ((gradient - expected[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: relative gradient error {error:.1e}"


# --- the same numbers as stock TRL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_equal_stock(build: Callable[..., Any], loss_type: str) -> None:
    """Every loss type of GRPOConfig, with old log-probabilities, a reference and a temperature."""
    import trl

    options = {"loss_type": loss_type, "beta": 0.04, "temperature": 0.8, "epsilon_high": 0.28}
    stock, shared = build(trl.GRPOTrainer, **options), build(adapter.GRPOTrainer, **options)
    assert_same_update(stock, shared, with_past(stock, make_batch(), reference=True))


def test_every_loss_type_of_trl_is_tested() -> None:
    """`loss_type` is free text in GRPOConfig; the source of `_compute_loss` says which values exist."""
    import inspect
    import re

    import trl

    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^]]*\]|\"\w+\")", source)
    assert {name for names in compared for name in re.findall(r"\"(\w+)\"", names)} == set(LOSS_TYPES)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4},
        {"entropy_coef": 0.05},
        {"top_entropy_quantile": 0.3},
        {"off_policy_mask_threshold": 0.05},
        {"delta": 1.2, "beta": 0.04, "use_bias_correction_kl": False},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda options: next(iter(options)) if isinstance(options, dict) else None,
)
def test_options_of_the_loss_equal_stock(build: Callable[..., Any], options: dict[str, Any]) -> None:
    import trl

    stock, shared = build(trl.GRPOTrainer, **options), build(adapter.GRPOTrainer, **options)
    assert_same_update(stock, shared, with_past(stock, make_batch(), reference="beta" in options))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text"])
def test_other_architectures_equal_stock(build: Callable[..., Any], model_type: str) -> None:
    import trl

    stock, shared = build(trl.GRPOTrainer, model_type), build(adapter.GRPOTrainer, model_type)
    assert_same_update(stock, shared, with_past(stock, make_batch()))


def test_log_probabilities_and_entropies_equal_stock(build: Callable[..., Any]) -> None:
    import trl

    stock, shared = build(trl.GRPOTrainer, temperature=0.7), build(adapter.GRPOTrainer, temperature=0.7)
    batch = make_batch()
    expected, found = (score_with(trainer, batch, compute_entropy=True) for trainer in (stock, shared))
    hidden = batch["completion_mask"] == 0
    for wanted, got in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(got, wanted.masked_fill(hidden, 0.0), rtol=1e-5, atol=2e-5)
        assert got.dtype == torch.float32
    assert found[2] is None
    assert score_with(shared, batch)[1] is None


def test_chunks_of_old_log_probabilities(build: Callable[..., Any]) -> None:
    """`batch_size` bounds the rows of one forward, whatever it cuts through."""
    shared, batch = build(adapter.GRPOTrainer), make_batch()
    whole, chunked = score_with(shared, batch)[0], score_with(shared, batch, batch_size=3)[0]
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_masked_truncated_completions(build: Callable[..., Any]) -> None:
    """With `mask_truncated_completions` TRL hides a whole completion: its prompt stays, nothing of it is scored."""
    import trl

    batch = make_batch()
    batch["completion_mask"][0] = 0
    stock, shared = build(trl.GRPOTrainer), build(adapter.GRPOTrainer)
    assert_same_update(stock, shared, with_past(stock, batch))


@pytest.mark.parametrize("kind", ["GRPOTrainer", "RLOOTrainer"])
@pytest.mark.parametrize("rows", [range(8), range(4)], ids=["all rows", "a whole group"])
def test_nothing_scored_equals_stock(build: Callable[..., Any], kind: str, rows: range) -> None:
    """All completions of a slice truncated, or empty: loss and gradients are stock's zeros, of the same parameters."""
    import trl

    batch = make_batch()
    batch["completion_mask"][list(rows)] = 0
    batch["num_items_in_batch"] = batch["completion_mask"].sum().clamp(min=1)
    stock, shared = build(getattr(trl, kind)), build(getattr(adapter, kind))
    if len(rows) < len(batch["completion_mask"]):
        assert_same_update(stock, shared, with_past(stock, batch))
        return
    batch = with_past(stock, batch)
    (expected_loss, expected), (loss, gradients) = (loss_and_gradients(trainer, batch) for trainer in (stock, shared))
    assert loss == pytest.approx(expected_loss)  # RLOO: minus the mean advantage, whatever is scored
    assert gradients.keys() == expected.keys()
    assert not any(gradient.any() for gradient in (*gradients.values(), *expected.values()))


@pytest.mark.parametrize("kind", ["GRPOTrainer", "RLOOTrainer"])
def test_run_of_truncated_completions_equals_stock(build: Callable[..., Any], kind: str) -> None:
    """TRL's own metrics of steps in which nothing is trained on, and weights that stay where they are."""
    import trl

    options = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 2, "beta": 0.0}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (expected, _), (rows, changes) = (train(build(getattr(module, kind), **options)) for module in (trl, adapter))
    assert [row["completions/clipped_ratio"] for row in rows] == [1.0, 1.0]
    for wanted, row in zip(expected, rows, strict=True):
        for name in wanted.keys() - {"step_time", "epoch"}:
            assert row[name] == pytest.approx(wanted[name], abs=1e-6, nan_ok=True), name
    assert not any(change.any() for change in changes.values())


def test_tool_tokens_are_context_without_loss(build: Callable[..., Any]) -> None:
    import trl

    batch = make_batch()
    batch["tool_mask"] = batch["completion_mask"].clone()
    batch["tool_mask"][:, 1:3] = 0
    stock, shared = build(trl.GRPOTrainer), build(adapter.GRPOTrainer)
    assert_same_update(stock, shared, with_past(stock, batch))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_equals_stock(build: Callable[..., Any], model_type: str) -> None:
    """Shared tokens count once per row in the auxiliary loss. Its weight is raised so that an error would show."""
    import trl

    options = {"router_aux_loss_coef": 1.0}
    stock, shared = build(trl.GRPOTrainer, model_type, **options), build(adapter.GRPOTrainer, model_type, **options)
    batch = with_past(stock, make_batch())
    expected, found = (score_with(trainer, batch, compute_aux_loss=True)[2] for trainer in (stock, shared))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_update(stock, shared, batch)


def test_rloo_equals_stock(build: Callable[..., Any]) -> None:
    import trl

    stock, shared = build(trl.RLOOTrainer), build(adapter.RLOOTrainer)
    assert_same_update(stock, shared, with_past(stock, make_batch()))


def test_learned_positions_follow_each_row_alone(build: Callable[..., Any]) -> None:
    """TRL's left padding shifts learned positions; a row alone, as it was sampled, is what the adapter computes."""
    import trl

    stock, shared = build(trl.GRPOTrainer, "gpt2"), build(adapter.GRPOTrainer, "gpt2")
    batch = make_batch()
    keep, padded = batch["completion_ids"].size(1), batch["prompt_mask"][:, 0] == 0
    with torch.no_grad():
        alone = torch.zeros(batch["completion_ids"].shape)
        for row in range(len(alone)):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            ids = torch.cat([prompt, completion])[None]
            logps = stock.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            alone[row, : len(completion)] = logps.gather(1, completion[:, None])[:, 0]
        found, padded_logps = score_with(shared, batch)[0], score_with(stock, batch)[0]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=2e-5)
    difference = ((padded_logps - alone) * batch["completion_mask"]).abs().amax(dim=1)
    assert keep == alone.size(1)
    assert (difference[padded] > 1e-3).all(), "stock TRL now numbers positions from the first real token"
    assert (difference[~padded] < 2e-5).all()


def test_streaming_under_a_token_budget(build: Callable[..., Any]) -> None:
    """`max_tokens` below the size of the tree changes the memory, not the numbers."""
    import trl

    stock = build(trl.GRPOTrainer)
    shared = build(adapter.GRPOTrainer, trainer_options={"max_tokens": 48})
    forwards = count_embedded(shared.model)
    assert_same_update(stock, shared, with_past(stock, make_batch()))
    assert len(forwards) > 2
    assert max(forwards) <= 48


# --- whole training runs ----------------------------------------------------------------------------------------------


def train(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logged rows of the training steps and the change of every parameter, with the rollouts of one fixed seed."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    torch.manual_seed(5)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return rows, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


def assert_same_run(
    stock: Any, shared: Any, steps: int, metrics: tuple[str, ...] = ("loss", "entropy", "kl"), tolerance: float = 1e-5
) -> list[dict[str, float]]:
    (expected, expected_changes), (rows, changes) = train(stock), train(shared)
    assert len(rows) == len(expected) == steps
    assert len({row["loss"] for row in expected}) > steps // 2, "the losses hardly change: nothing to compare"
    for wanted, row in zip(expected, rows, strict=True):
        assert row.get("reward") == wanted.get("reward"), f"step {wanted['step']} sampled other completions"
        for name in metrics:
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], abs=tolerance, rel=tolerance), (wanted["step"], name)
    for name, change in changes.items():
        # As a whole: Adam turns the rounding of a gradient near zero into a visible step of that single entry.
        error = (change - expected_changes[name]).norm()
        assert error <= 1e-3 * expected_changes[name].norm(), f"{name} was trained differently"
    return rows


def test_twenty_steps_equal_stock(build: Callable[..., Any]) -> None:
    """Sampled by the model that is being trained: one wrong gradient and the runs drift apart."""
    import trl

    options = {"max_steps": 20, "beta": 0.04, "num_iterations": 2, "learning_rate": 1e-3}
    assert_same_run(build(trl.GRPOTrainer, **options), build(adapter.GRPOTrainer, **options), steps=20)


def test_run_with_slices_equals_stock(build: Callable[..., Any]) -> None:
    """Two slices per step: the order of rows differs from stock, the step's loss and gradient (DAPO: a sum) do not."""
    import trl

    options = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stock, shared = build(trl.GRPOTrainer, **options), build(adapter.GRPOTrainer, **options)
    rows = assert_same_run(stock, shared, steps=4, metrics=("loss",))  # the others are means over unequal slices
    assert all(row["stemma/token_ratio"] > 1.5 for row in rows)


def test_rloo_run_equals_stock(build: Callable[..., Any]) -> None:
    """RLOO always computes old and reference log-probabilities (its beta is 0.05)."""
    import trl

    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stock, shared = build(trl.RLOOTrainer, **options), build(adapter.RLOOTrainer, **options)
    assert_same_run(stock, shared, steps=3, metrics=("loss",))


@pytest.mark.parametrize("pretrained", [False, True], ids=["new adapter", "adapter to continue"])
def test_lora_run_equals_stock(build: Callable[..., Any], model_folder: Callable[..., str], pretrained: bool) -> None:
    """The reference is the model without the new adapter, or a frozen copy ("ref") of the one to continue."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    import trl

    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    options: dict[str, Any] = {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "gradient_checkpointing": True}

    def trainer(trainer_class: type) -> Any:
        if not pretrained:
            return build(trainer_class, trainer_options={"peft_config": config}, **options)
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny_model(**SIZES), config)
        return build(trainer_class, model=model, **options)

    stock, shared = trainer(trl.GRPOTrainer), trainer(adapter.GRPOTrainer)
    frozen = shared.model.base_model.model.model.embed_tokens.weight.clone()
    rows = assert_same_run(stock, shared, steps=4)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6) if pretrained else rows[0]["kl"] > 1e-5
    assert torch.equal(shared.model.base_model.model.model.embed_tokens.weight, frozen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(build: Callable[..., Any], reentrant: bool) -> None:
    options = {"beta": 0.04, "max_steps": 2}
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, recomputed = build(adapter.GRPOTrainer, **options), build(adapter.GRPOTrainer, **options, **checkpointed)
    assert_same_run(plain, recomputed, steps=2)


def test_defaults_of_trl_run(build: Callable[..., Any]) -> None:
    """bf16 and gradient checkpointing are on by default, on the CPU too: the step equals stock's within bfloat16."""
    import trl

    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1, "beta": 0.04}
    (expected, _), (rows, changes) = (train(build(kind, **options)) for kind in (trl.GRPOTrainer, adapter.GRPOTrainer))
    assert rows[0]["entropy"] == pytest.approx(expected[0]["entropy"], rel=1e-2)
    assert rows[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=5e-2)
    assert all(change.isfinite().all() for change in changes.values())


def test_evaluation_is_shared_too(build: Callable[..., Any]) -> None:
    shared = build(adapter.GRPOTrainer, per_device_eval_batch_size=8)
    metrics = shared.evaluate(shared.train_dataset)
    logged = shared.state.log_history[-1]
    assert torch.tensor(metrics["eval_loss"]).isfinite()
    assert logged["eval_stemma/token_ratio"] > 1.5


# --- groups stay whole, and the switch switches -----------------------------------------------------------------------


def slices_of_first_batch(trainer: Any) -> list[dict[str, Any]]:
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def test_slices_hold_whole_groups_in_random_order(build: Callable[..., Any]) -> None:
    import trl

    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    orders = set()
    for seed in range(4):
        slices = slices_of_first_batch(build(adapter.GRPOTrainer, seed=seed, shuffle_dataset=False, **options))
        assert [len(part["prompt_ids"].unique(dim=0)) for part in slices] == [1, 1, 1, 1]
        orders.add(tuple(part["prompt_mask"][0].sum().item() for part in slices))
    assert len(orders) > 1, "every seed gave the same order of groups"
    stock = slices_of_first_batch(build(trl.GRPOTrainer, seed=0, shuffle_dataset=False, **options))
    assert max(len(part["prompt_ids"].unique(dim=0)) for part in stock) > 1, "stock TRL keeps groups whole by itself"


def test_no_random_number_is_drawn(build: Callable[..., Any]) -> None:
    """Rollouts of one seed stay those of stock TRL, and so do the rows of a generation batch."""
    import trl

    batches, states = [], []
    for kind in (trl.GRPOTrainer, adapter.GRPOTrainer):
        trainer = build(kind, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        slices = slices_of_first_batch(trainer)
        states.append(torch.get_rng_state())
        rows = [
            (ids.tolist(), advantage.item())
            for part in slices
            for ids, advantage in zip(part["completion_ids"], part["advantages"], strict=True)
        ]
        batches.append(sorted(rows))
    assert torch.equal(*states)
    assert batches[0] == batches[1]


def test_token_ratio_with_two_slices_is_the_ideal(build: Callable[..., Any]) -> None:
    """The logged ratio is that of whole groups; with TRL's own row shuffle it would be lower."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 1}
    shared = build(adapter.GRPOTrainer, **options)
    rows, _ = train(shared)
    ratios, forwarded = [], []
    for part in shared._buffered_inputs:
        pairs = zip(part["prompt_ids"], part["prompt_mask"], strict=True)
        prompts = {tuple(ids[mask.bool()].tolist()) for ids, mask in pairs}
        total = (part["prompt_mask"].sum() + part["completion_mask"].sum()).item()
        assert len(prompts) == 2
        unique = sum(map(len, prompts)) + part["completion_mask"].sum().item()
        ratios.append(total / unique)
        forwarded.append(unique)
    # Completions that begin alike by chance are not shared: too short for a node of their own.
    assert rows[0]["stemma/token_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-6)
    assert rows[0]["stemma/forwarded_tokens"] == sum(forwarded)


def test_fewer_tokens_reach_the_model(build: Callable[..., Any]) -> None:
    """Counted at the embedding, where no flag can lie."""
    import trl

    batch, counted = make_batch(), {}
    for kind in (trl.GRPOTrainer, adapter.GRPOTrainer):
        trainer = build(kind)
        forwards = count_embedded(trainer.model)
        loss_and_gradients(trainer, batch)  # after a new hook the guard against random numbers looks at the model again
        forwards.clear()
        loss_and_gradients(trainer, batch)
        counted[kind] = sum(forwards)
    completion_tokens = batch["completion_mask"].sum().item()
    assert counted[trl.GRPOTrainer] == 8 * (29 + 8)
    assert counted[adapter.GRPOTrainer] == 29 + 17 + completion_tokens


def test_generation_is_untouched(build: Callable[..., Any]) -> None:
    """Rollouts run through the model's own attention: the same tokens as stock for the same seed."""
    import trl

    drawn = []
    for kind in (trl.GRPOTrainer, adapter.GRPOTrainer):
        trainer = build(kind)
        torch.manual_seed(11)
        drawn.append(trainer._generate_single_turn([[1, 2, 3], [4, 5, 6, 7]], None, {}, 1)[0])
    assert drawn[0] == drawn[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_multimodal_inputs_are_refused_by_name(build: Callable[..., Any]) -> None:
    shared = build(adapter.GRPOTrainer)
    with pytest.raises(StemmaError, match=r"pixel_values.*import GRPOTrainer from trl"):
        score_with(shared, make_batch(), pixel_values=torch.zeros(1), num_tiles=None)
    with pytest.raises(StemmaError, match="an_argument_of_tomorrow"):
        score_with(shared, make_batch(), an_argument_of_tomorrow=1)


def test_multimodal_processor_is_refused(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    construct = trl.GRPOTrainer.__init__

    def construct_with_images(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self._is_vlm = True  # what TRL sets for a ProcessorMixin

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", construct_with_images)
    with pytest.raises(StemmaError, match="multimodal processor"):
        build(adapter.GRPOTrainer)


@pytest.mark.parametrize("option", ["use_liger_kernel", "use_transformers_continuous_batching"])
def test_options_that_replace_parts_of_the_model_are_refused(build: Callable[..., Any], option: str) -> None:
    with pytest.raises(StemmaError, match=f"{option}=True"):
        build(adapter.GRPOTrainer, **{option: True})


def test_active_dropout_is_refused_before_training(build: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="dropout"):
        build(adapter.GRPOTrainer, model_options={"attention_dropout": 0.1})
    # GPT-2's dropout layers are the kind that TRL can switch off.
    build(adapter.GRPOTrainer, "gpt2", model_options={"resid_pdrop": 0.1}, disable_dropout=True)


def test_an_enabled_model_is_welcome(build: Callable[..., Any], model_folder: Callable[..., str]) -> None:
    """The reference model takes over the attention implementation of the policy, whatever its name."""
    from transformers import AutoModelForCausalLM

    from stemma.scoring.enable import enable

    policy = enable(AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32))
    rows, _ = train(build(adapter.GRPOTrainer, model=policy, beta=0.04, max_steps=1))
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_unsupported_model_is_refused_before_training(build: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="bloom"):
        build(adapter.GRPOTrainer, "bloom")


def test_cut_groups_are_announced(build: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=r"per_device_train_batch_size=2 is not a multiple of num_generations=4"):
        build(adapter.GRPOTrainer, per_device_train_batch_size=2, gradient_accumulation_steps=4)


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "1.17.0.dev0", "2.0.0", "0.29.1"])
def test_untested_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import trl

    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(StemmaError, match=rf"tested with trl>=1.16,<1.17, and trl {version} is installed"):
        adapter._tested_trainer("GRPOTrainer")


def test_changed_hooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    name = "_get_per_token_logps_and_entropies"
    replacements = {
        "renamed": lambda self, model, token_ids, attention_mask, logits_to_keep: None,
        "hidden": lambda self, model, *args, batch_size=None, compute_aux_loss=False, **kwargs: None,
    }
    for replacement in replacements.values():
        monkeypatch.setattr(trl.GRPOTrainer, name, replacement)
        with pytest.raises(StemmaError, match=f"GRPOTrainer.{name}"):
            adapter._tested_trainer("GRPOTrainer")
    monkeypatch.undo()
    monkeypatch.delattr(trl.GRPOTrainer, "_prepare_inputs")
    with pytest.raises(StemmaError, match="_prepare_inputs"):
        adapter._tested_trainer("GRPOTrainer")
    monkeypatch.undo()
    assert adapter._tested_trainer("GRPOTrainer") is trl.GRPOTrainer


def test_it_is_trls_trainer() -> None:
    import trl

    for name in ("GRPOTrainer", "RLOOTrainer"):
        trainer = getattr(adapter, name)
        assert issubclass(trainer, getattr(trl, name))
        assert trainer.__module__ == "stemma.rl.trl"
        assert getattr(adapter, name) is trainer
