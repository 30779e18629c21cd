"""The adapter on Hugging Face models: what it leaves alone, what it adds, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stemma
from stemma.errors import InvalidBatchError, InvalidDataError, UnsupportedModelError
from stemma.models.adapter import is_enabled
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.models.tiny import tiny_model
from stemma.prefix.tree import PrefixTree
from stemma.tune.ntk_attention import (
    Config,
    attach,
    conversion_error,
    detach,
    load_adapter,
    parameter_count,
    peft_prefix_states,
    prefix_states,
    save_adapter,
)

DOUBLE = torch.float64
MAPS = [Config(), Config(feature_map="random", num_features=40), Config(feature_map="taylor", degree=2)]
TYPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gpt2": {},
    "gpt_oss": {"num_key_value_heads": 2, "experts_implementation": "eager"},
    "gemma2": {"num_key_value_heads": 2},
}


def make(kind: str = "llama", **options: Any) -> Any:
    sizes = {"dtype": DOUBLE, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, **TYPES[kind], **options}
    implementation = sizes.pop("experts_implementation", None)
    model = tiny_model(kind, **sizes)
    if implementation:
        model.set_experts_implementation(implementation)
    return model


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def weigh(model: Any, seed: int = 0) -> Any:
    """Attach a prefix that matters: heavy, with values of size 1 that differ by feature."""
    attach(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if KERNEL_PREFIX in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_prefix_without_effect_is_the_model_bit_for_bit(kind: str) -> None:
    model = make(kind)
    ids = tokens(0, 2, 7)
    before = model(input_ids=ids).logits
    attach(model, Config(initial_mass=0.0))
    assert torch.equal(model(input_ids=ids).logits, before)
    detach(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert parameter_count(model) == 0


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "eager") for kind in TYPES), *((k, "sdpa") for k in ("llama", "mistral", "gpt2"))],
)
def test_it_changes_every_type_and_padding_changes_nothing(kind: str, implementation: str) -> None:
    model = make(kind)
    model.set_attn_implementation(implementation)
    ids, mask = tokens(1, 2, 9), torch.ones(2, 9, dtype=torch.int64)
    plain = model(input_ids=ids).logits
    weigh(model)
    alone = [model(input_ids=row[None, begin:]).logits[0] for row, begin in zip(ids, (3, 0), strict=True)]
    assert (alone[1] - plain[1]).abs().max() > 1e-3
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, begin, expected in zip(padded, (3, 0), alone, strict=True):
        close(row[begin:], expected, 1e-9 if implementation == "sdpa" else 1e-6)
    (padded[:, 3:] ** 2).sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if KERNEL_PREFIX in n)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_cached_decoding_is_the_full_forward(kind: str) -> None:
    model = weigh(make(kind))
    ids = tokens(2, 2, 10)
    full = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :6], use_cache=True)
    cache, parts = first.past_key_values, [first.logits]
    for at in range(6, 10):
        parts.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    close(torch.cat(parts, 1), full)
    assert cache.get_seq_length() == 10
    found = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:, 10], full[:, -1].argmax(-1))


@pytest.mark.parametrize("config", MAPS, ids=lambda c: c.feature_map)
@pytest.mark.parametrize("per", ["query_head", "key_head"])
@pytest.mark.parametrize("rank", [None, 2])
def test_parameter_count(config: Config, per: Any, rank: int | None) -> None:
    model = attach(make(num_hidden_layers=3), replace(config, per=per, rank=rank, layers=(0, 2)))
    features, prefixes = config.map.size(8), 4 if per == "query_head" else 2
    values = features * 8 if rank is None else rank * (features + 8)
    assert parameter_count(model) == 2 * prefixes * (features + values)
    assert parameter_count(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [hasattr(layer.self_attn, KERNEL_PREFIX) for layer in model.model.layers] == [True, False, True]


def test_an_untrained_prefix_weighs_as_much_as_it_should() -> None:
    """Its features and those of queries of size 0 give the log of the mass, up to the smallness of its keys."""
    for config, expected in (
        (Config(), 8.0),
        (Config(normalize=False), 8.0),
        (Config(feature_map="taylor"), 8.0),
        (Config(initial_mass=1.0), 1.0),
        (Config(initial_mass=40.0), 40.0),
    ):
        kernel = attach(make(), config).model.layers[0].self_attn.kernel_prefix.default
        _, log_sum = kernel(torch.zeros(1, 4, 1, 8, dtype=DOUBLE), 1.0)
        close(log_sum.exp(), torch.full_like(log_sum, expected), 0.05)


def test_selected_heads_alone_have_a_prefix() -> None:
    model = attach(make(), Config(heads=(1, 3)))
    kernel = model.model.layers[0].self_attn.kernel_prefix.default
    answer, log_sum = kernel(torch.randn(1, 4, 5, 8, dtype=DOUBLE), 1.0)
    assert log_sum.isinf().all(-1).tolist() == [[True, False, True, False]]
    assert answer.isfinite().all()
    (model(input_ids=tokens(0, 1, 5)).logits ** 2).sum().backward()
    assert kernel.key.grad.isfinite().all()


def test_a_prefix_of_tokens_is_that_prefix() -> None:
    """The states behave as the tokens in front (rotary tables are float32, hence the tolerance); stand-ins of higher
    degree come closer."""
    model, ids, inputs = make(), tokens(3, 1, 40), tokens(4, 2, 6)
    states = prefix_states(model, ids)
    whole = model(input_ids=torch.cat([ids.expand(2, -1), inputs], 1)).logits[:, 40:]
    errors = []
    for config in (Config(normalize=False), Config(), *(Config(feature_map="taylor", degree=d) for d in (1, 2))):
        attach(model, config, prefix=states)
        error = conversion_error(model, states, inputs)
        errors.append(error.max_logit_error)
        assert error.kl < error.kl_without
        close(model(input_ids=inputs).logits, whole, 2 * error.max_logit_error + 1e-6)
        detach(model)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_low_rank_of_a_prefix_is_its_best_approximation() -> None:
    model = make()
    states = prefix_states(model, tokens(3, 20))
    full = attach(model, Config(), prefix=states).model.layers[0].self_attn.kernel_prefix.default.sums.value
    detach(model)
    low = attach(model, Config(rank=3), prefix=states).model.layers[0].self_attn.kernel_prefix.default.sums.value
    singular = torch.linalg.svdvals(full)
    close((full - low).square().sum((1, 2)), singular[:, 3:].square().sum(1))


def test_a_peft_prefix_is_that_prefix() -> None:
    peft = pytest.importorskip("peft")
    base = make(num_key_value_heads=4)
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
    inputs = tokens(5, 2, 6)
    expected = model(input_ids=inputs).logits
    states = peft_prefix_states(model)
    base = model.get_base_model()
    attach(base, Config(feature_map="taylor", degree=3), prefix=states)
    error = conversion_error(base, states, inputs)
    close(base(input_ids=inputs).logits, expected, 2 * error.max_logit_error + 1e-6)
    assert error.max_logit_error < 0.1 * (model.get_base_model()(input_ids=inputs).logits - expected).abs().max() + 0.05
    with pytest.raises(UnsupportedModelError, match="prefix-tuning"):
        peft_prefix_states(base)


@pytest.mark.parametrize("config", [Config(), Config(per="key_head", rank=2, layers=(1,))], ids=["plain", "options"])
def test_save_and_load_are_bit_equal(config: Config, tmp_path: Path) -> None:
    model = attach(make(), config)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if KERNEL_PREFIX in n):
            parameter.add_(0.3)
    ids = tokens(7, 1, 6)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["per"] == config.per
    again = load_adapter(make(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert parameter_count(again) == parameter_count(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="no adapter"):
        load_adapter(make(), tmp_path)
    save_adapter(attach(make()), tmp_path)
    other = make(num_hidden_layers=3)
    with pytest.raises(InvalidDataError, match="does not fit"):
        load_adapter(other, tmp_path)
    assert parameter_count(other) == 0
    assert not is_enabled(other)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"peft_type": "LORA"}))
    with pytest.raises(InvalidDataError, match="LORA"):
        load_adapter(make(), tmp_path)
    for wrong in ("[]", "null", '"options"'):
        (tmp_path / "adapter_config.json").write_text(wrong)
        with pytest.raises(InvalidDataError, match="must be an object of options"):
            load_adapter(make(), tmp_path)


def test_parameters_stay_in_float32_and_travel_with_the_model() -> None:
    model = attach(make(dtype=torch.bfloat16))
    own = {name: tensor for name, tensor in model.state_dict().items() if KERNEL_PREFIX in name}
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert set(own) == {
        f"model.layers.{i}.self_attn.kernel_prefix.default.{n}" for i in (0, 1) for n in ("key", "value")
    }
    assert model(input_ids=tokens(0, 1, 4)).logits.dtype == torch.bfloat16


def gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_nothing() -> None:
    model = weigh(make())
    model.train()
    ids = tokens(8, 2, 8)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    plain = gradients(model, loss)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, loss)
    assert len(plain) == 4
    for name, grad in plain.items():
        close(again[name], grad)


@pytest.mark.parametrize("freeze", [True, False])
def test_training_together_with_lora(freeze: bool) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make(), lora)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().lm_head.requires_grad_(freeze)  # not what peft trains
    attach(model, freeze=freeze)
    assert {name for name, p in model.named_parameters() if p.requires_grad and KERNEL_PREFIX not in name} == before
    found = gradients(model, lambda: model(input_ids=tokens(9, 1, 6), labels=tokens(9, 1, 6)).loss)
    assert any("lora_B" in name for name in found)
    assert sum(KERNEL_PREFIX in name for name in found) == 4
    assert all(KERNEL_PREFIX in name or "lora" in name or "modules_to_save" in name for name in found)


def test_a_prefix_tree_sees_the_same_prefix() -> None:
    model = weigh(make())
    shared = list(range(1, 20))
    sequences = [[*shared, 9], [*shared, 20, 21], [*shared, 20, 30, 31], [40, 41, 42]]
    tree = PrefixTree.from_sequences(sequences)
    assert tree.unique_tokens < sum(map(len, sequences))
    found: dict[str, Tensor] = {}

    def loss(mode: Any) -> Tensor:
        found[mode] = stemma.score(model, tree, mode=mode).logprobs
        return found[mode].sum()

    together, alone = (gradients(model, partial(loss, mode)) for mode in ("shared", "plain"))
    close(found["shared"], found["plain"])
    close(stemma.score(model, tree, mode="shared", max_tokens=24).logprobs, found["plain"])
    assert len(alone) == 4
    for name, grad in alone.items():
        close(together[name], grad, 1e-6)  # float32 norms round otherwise in a packed row


def test_training_moves_the_prefix_alone() -> None:
    model, ids = attach(make()), tokens(10, 4, 12)
    frozen = {n: p.clone() for n, p in model.named_parameters() if KERNEL_PREFIX not in n}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_what_would_ignore_the_prefix_is_refused() -> None:
    model = weigh(make())
    stemma.disable(model)
    with pytest.raises(UnsupportedModelError, match="ignored"):
        model(input_ids=tokens(0, 1, 4))
    stemma.enable(model, self_test=False)
    model.config._attn_implementation = "stemma_flash_attention_2"
    detach(model)
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        attach(model)


def test_sampled_groups_see_the_prefix() -> None:
    from stemma.decode.rollout import LocalGenerator

    model = weigh(make(dtype=torch.float32))
    prompt = list(range(1, 20))
    greedy = LocalGenerator(eos_token_id=63, top_k=1)
    rows = greedy(model, [prompt], num_generations=4, max_new_tokens=3, seed=0)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=63, pad_token_id=0
    )
    assert rows.completions[0][0] == expected[0, 19:].tolist()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"per": "token"}, "per must"),
        ({"rank": 0}, "rank must"),
        ({"initial_mass": -1.0}, "initial_mass"),
        ({"initial_mass": float("nan")}, "initial_mass"),
        ({"initial_mass": float("inf")}, "initial_mass"),
        ({"degree": 7}, "degree"),
        ({"feature_map": "relu"}, "name must"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Config(**options)


@pytest.mark.parametrize("options", [{"layers": (2,)}, {"layers": ()}, {"heads": (4,)}, {"heads": (0, 0)}, {"rank": 9}])
def test_options_that_do_not_fit_the_model_leave_it_alone(options: dict[str, Any]) -> None:
    model = make()
    with pytest.raises(ValueError, match=next(iter(options))):
        attach(model, Config(**options))
    assert parameter_count(model) == 0
    assert not is_enabled(model)
    assert all(p.requires_grad for p in model.parameters())


def test_bad_prefixes_are_refused() -> None:
    with pytest.raises(InvalidBatchError, match="no token"):
        prefix_states(make(), [])
    model = make()
    with pytest.raises(UnsupportedModelError, match="attach one first"):
        conversion_error(model, prefix_states(model, [1, 2]), tokens(0, 1, 3))
    with pytest.raises(ValueError, match="attach an adapter first"):
        save_adapter(model, "unused")
