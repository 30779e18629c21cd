"""Several prefixes on one model: who answers, that answers together are those of the summed sums, and clashes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import decoders
import stemma
from decoders import keep_double
from stemma.errors import InvalidBatchError, InvalidDataError, UnsupportedModelError
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.models.tiny import tiny_model
from stemma.tune.ntk_attention import (
    Config,
    active_adapters,
    adapter_names,
    attach,
    delete_adapter,
    detach,
    disable_adapter,
    load_adapter,
    parameter_count,
    prefix_states,
    save_adapter,
    set_adapter,
)

IDS = torch.tensor([[5, 9, 2, 40, 33, 7]])


def decoder(**options: Any) -> Any:
    """The same model every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return decoders.decoder(**options)


def heavy(model: Any, name: str, config: Config | None = None, seed: int = 0) -> Any:
    """Attach a prefix that matters, with values of size 1 that differ by feature."""
    attach(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f"{KERNEL_PREFIX}.{name}." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def trained(model: Any) -> set[str]:
    return {
        name.split(f"{KERNEL_PREFIX}.")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }


def test_the_active_adapter_alone_answers_and_is_trained() -> None:
    model = decoder()
    bare = logits(model)
    first = logits(heavy(model, "a"))
    second = logits(heavy(model, "b", Config(per="key_head", layers=(1,)), seed=1))
    assert adapter_names(model) == ["a", "b"]
    assert active_adapters(model) == ["b"]
    assert trained(model) == {"b"}
    alone = logits(heavy(decoder(), "b", Config(per="key_head", layers=(1,)), seed=1))
    assert torch.equal(second, alone)
    counts = []
    for names in ("a", ["b"], ["a", "b"]):
        set_adapter(model, names)
        assert trained(model) == set(active_adapters(model)) == set(names)
        counts.append(parameter_count(model))
    assert counts[2] == counts[0] + counts[1] > counts[0] > counts[1] > 0
    set_adapter(model, "a")
    assert torch.equal(logits(model), first)
    with disable_adapter(model):
        assert active_adapters(model) == []
        assert torch.equal(logits(model), bare)
        with disable_adapter(model):
            pass
        assert active_adapters(model) == []
    assert torch.equal(logits(model), first)
    with disable_adapter(model):
        delete_adapter(model, "a")
    assert adapter_names(model) == ["b"]
    assert active_adapters(model) == []
    assert torch.equal(logits(model), bare)
    set_adapter(model, "b")
    assert torch.equal(logits(model), second)
    assert torch.equal(logits(detach(model)), bare)
    assert not any(KERNEL_PREFIX in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(feature_map="random", num_features=40, seed=3),
        Config(feature_map="taylor", degree=2),
        Config(per="key_head"),
        Config(heads=(1, 2)),
    ],
    ids=["elu", "random", "taylor", "key heads", "some heads"],
)
def test_two_parts_of_a_prefix_together_are_the_whole(config: Config) -> None:
    model = decoder()
    states = prefix_states(model, list(range(3, 25)))
    parts = {
        "early": {m: (key[:, :, :9], value[:, :, :9]) for m, (key, value) in states.items()},
        "late": {m: (key[:, :, 9:], value[:, :, 9:]) for m, (key, value) in states.items()},
    }
    with keep_double():
        attach(model, config, prefix=states)
        whole = logits(model)
        detach(model)
        for name, part in parts.items():
            attach(model, config, adapter_name=name, prefix=part)
            assert (logits(model) - whole).abs().max() > 1e-4
        for names in (["early", "late"], ["late", "early"]):
            set_adapter(model, names)
            torch.testing.assert_close(logits(model), whole, rtol=0, atol=1e-12)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert trained(model) == {"early", "late"}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_adapters_of_different_layers_heads_and_maps_answer_together() -> None:
    model = heavy(decoder(), "a", Config(layers=(0,), heads=(0,)))
    heavy(model, "b", Config(layers=(1,), feature_map="random", num_features=30))
    heavy(model, "c", Config(heads=(3,), per="query_head"), seed=2)
    set_adapter(model, ["a", "b", "c"])
    together = logits(model)
    for missing in "abc":
        set_adapter(model, sorted({"a", "b", "c"} - {missing}))
        assert (logits(model) - together).abs().max() > 1e-4
    set_adapter(model, ["c", "b", "a"])
    torch.testing.assert_close(logits(model), together)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_copy_of_the_model_has_adapters_of_its_own() -> None:
    model = heavy(decoder(), "a")
    other = copy.deepcopy(model)
    delete_adapter(model, "a")
    assert active_adapters(other) == ["a"]
    assert (logits(other) - logits(model)).abs().max() > 1e-2


def test_one_of_several_is_saved_and_loaded_under_another_name(tmp_path: Path) -> None:
    model = heavy(heavy(decoder(), "a"), "b", Config(layers=(1,)), seed=1)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got None"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "b")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers"] == [1]
    other = heavy(decoder(), "a")
    load_adapter(other, tmp_path, "again")
    assert active_adapters(other) == ["again"]
    assert torch.equal(logits(other), expected)


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    save_adapter(heavy(decoder(num_hidden_layers=3), "a"), tmp_path)
    model = heavy(decoder(), "a")
    set_adapter(model, "a")
    before = logits(model), trained(model)
    with pytest.raises(InvalidDataError, match="does not fit"):
        load_adapter(model, tmp_path, "b")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()) | {"layers": [7]})
    )
    with pytest.raises(InvalidDataError, match="layers must be"):
        load_adapter(model, tmp_path, "b")
    assert torch.equal(logits(model), before[0])
    assert trained(model) == before[1]
    assert adapter_names(model) == ["a"]
    cut = tmp_path / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(InvalidDataError, match="holds no adapter"):
        load_adapter(model, tmp_path, "b")


@pytest.mark.parametrize("name", ["a", "", "x.y", "active", "chosen", "keys", "forward"])
def test_names_that_clash_are_refused(name: str, tmp_path: Path) -> None:
    model = heavy(decoder(), "a")
    save_adapter(model, tmp_path)
    for add in (lambda: attach(model, adapter_name=name), lambda: load_adapter(model, tmp_path, name)):
        with pytest.raises(ValueError, match="already" if name == "a" else "cannot be named"):
            add()
    assert adapter_names(model) == ["a"]


def test_what_is_chosen_or_attached_while_adapters_are_disabled_acts_afterwards(tmp_path: Path) -> None:
    model = heavy(heavy(decoder(), "a", seed=1), "b", seed=2)
    bare = logits(decoder())
    only_b = logits(model)
    set_adapter(model, "a")
    only_a = logits(model)
    with disable_adapter(model):
        assert active_adapters(model) == []
        set_adapter(model, "b")
        assert torch.equal(logits(model), bare)
        with disable_adapter(model):
            pass
        assert torch.equal(logits(model), bare)
    assert (active_adapters(model), trained(model)) == (["b"], {"b"})  # as peft has it
    assert torch.equal(logits(model), only_b)
    with disable_adapter(model):
        heavy(model, "c", Config(layers=(0,)), seed=3)
        delete_adapter(model, "b")
        assert torch.equal(logits(model), bare)
    assert (active_adapters(model), trained(model)) == (["c"], {"c"})
    assert not torch.equal(logits(model), bare)
    set_adapter(model, "a")
    assert torch.equal(logits(model), only_a)


def test_weights_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    save_adapter(heavy(decoder(), "a"), tmp_path)
    with torch.device("meta"):
        model = tiny_model("llama", **decoders.SIZES)
    for add in (lambda: attach(model), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(UnsupportedModelError, match="meta device"):
            add()


def test_attention_weights_with_a_prefix_are_refused() -> None:
    model = decoder()
    stemma.disable(model)
    model.set_attn_implementation("eager")
    heavy(model, "a")
    with pytest.raises(UnsupportedModelError, match="leave out output_attentions, or disable the adapter"):
        model(IDS, output_attentions=True)
    with disable_adapter(model):
        assert len(model(IDS, output_attentions=True).attentions) == model.config.num_hidden_layers


@pytest.mark.parametrize("names", ["z", [], ["a", "a"], ["a", "z"]])
def test_unknown_adapters_are_refused(names: Any) -> None:
    model = heavy(decoder(), "a")
    with pytest.raises(ValueError, match="one or more different ones"):
        set_adapter(model, names)
    with pytest.raises(ValueError, match="no adapter"):
        delete_adapter(model, "z")
    assert active_adapters(model) == ["a"]


def test_a_prefix_that_was_encoded_under_other_adapters_is_refused() -> None:
    model = heavy(heavy(decoder(), "a"), "b", seed=1)
    handle = stemma.SharedPrefix.from_ids(model, list(range(1, 20)))
    stemma.generate(model, None, [[5]], prefix=handle, max_new_tokens=2)
    for change in (lambda: set_adapter(model, "a"), lambda: set_adapter(model, ["b", "a"])):
        change()
        with pytest.raises(InvalidBatchError, match="has changed"):
            stemma.generate(model, None, [[5]], prefix=handle, max_new_tokens=2)
    set_adapter(model, "b")
    stemma.generate(model, None, [[5]], prefix=handle, max_new_tokens=2)
    with disable_adapter(model), pytest.raises(InvalidBatchError, match="has changed"):
        stemma.generate(model, None, [[5]], prefix=handle, max_new_tokens=2)
