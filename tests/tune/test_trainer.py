"""`transformers.Trainer` and autocast: an adapter is trained, evaluated, accumulated and resumed like a parameter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stemma
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.models.tiny import tiny_model
from stemma.tune.ntk_attention import Config, attach, prefix_states, set_adapter

IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()]


def make(kind: str = "llama", **options: Any) -> Any:
    return tiny_model(kind, vocab_size=64, hidden_size=32, **options)


def weigh(model: Any, config: Config | None = None, **options: Any) -> Any:
    """Attach a prefix that matters."""
    attach(model, config, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if KERNEL_PREFIX in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_strategy": "no",
    } | options
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant", **settings
    )
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_the_trainer_trains_an_adapter(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = attach(make(kind))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert all(KERNEL_PREFIX in name for name in trained(model))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((6, 1), (2, 3)):
        model = weigh(make(dtype=torch.float64))
        trainer(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd"
        ).train()
        found.append(trained(model))
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model = attach(make())
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    again = attach(make())
    run = trainer(again, tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    for name, parameter in trained(model).items():
        assert torch.equal(trained(again)[name], parameter)


def test_the_trainer_trains_an_enabled_model_as_it_does_without(tmp_path: Path) -> None:
    models = [make(), stemma.enable(make())]
    for model in models:
        trainer(model, tmp_path).train()
    plain, enabled = (trained(model) for model in models)
    assert all(torch.equal(enabled[name], parameter) for name, parameter in plain.items())


def test_labels_that_are_shifted_already_are_for_the_loss_alone() -> None:
    model = weigh(make())
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS, shift_labels=shifted).loss, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(feature_map="random", num_features=40),
        Config(feature_map="taylor", degree=2, initial_mass=1.0),
        Config(heads=(0, 2)),
        Config(rank=2),
    ],
    ids=["elu", "random", "taylor", "heads", "rank"],
)
def test_autocast_is_float32_but_for_rounding(config: Config, dtype: torch.dtype) -> None:
    model = attach(make(), config) if config.feature_map == "taylor" else weigh(make(), config)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = model(input_ids=IDS, attention_mask=mask, labels=IDS)
            output.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        found.append((output.logits[mask.bool()].float(), grads))
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_answers_are_in_float32_under_autocast(kind: str) -> None:
    """Several adapters, soft-capped scores: what is merged has one type, and is exactly the answer without autocast."""
    model = weigh(weigh(make(kind), adapter_name="a"), Config(feature_map="random"), adapter_name="b")
    set_adapter(model, ["a", "b"])
    kernel = model.model.layers[0].self_attn.kernel_prefix
    query = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    expected, whole = kernel(query, 0.4), model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        for found, exact in zip(kernel(query, 0.4), expected, strict=True):
            assert torch.equal(found, exact)
        assert (model(input_ids=IDS).logits - whole).norm() < 0.03 * whole.norm()


def test_score_under_autocast() -> None:
    model = weigh(make())
    tree = stemma.PrefixTree.from_sequences([[*range(1, 12), 20], [*range(1, 12), 21, 22]])
    expected = stemma.score(model, tree, mode="plain").logprobs
    with torch.autocast("cpu", torch.bfloat16):
        for mode in ("plain", "shared"):
            found = stemma.score(model, tree, mode=mode).logprobs
            torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_stand_in_made_under_autocast_has_its_rank() -> None:
    """Sums over a prefix, and their best approximation, are computed in float32 too."""
    model = make()
    states = prefix_states(model, list(range(1, 30)))
    expected = trained(attach(model, Config(rank=2), adapter_name="a", prefix=states))
    with torch.autocast("cpu", torch.bfloat16):
        attach(model, Config(rank=2), adapter_name="b", prefix=states)
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, expected[name.replace(".b.", ".a.")])
