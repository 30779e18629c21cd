"""Stand-ins of given prefixes: what the comparison with the exact one needs, and prefixes that do not fit."""

import copy
from typing import Any

import pytest
import torch

from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import is_enabled
from stemma.models.tiny import tiny_model
from stemma.tune.ntk_attention import (
    Config,
    adapter_names,
    attach,
    conversion_error,
    detach,
    peft_prefix_states,
    prefix_states,
)

IDS = torch.tensor([[5, 9, 2, 40, 33, 7]])


def make(kind: str = "gpt2", **options: Any) -> Any:
    return tiny_model(kind, dtype=torch.float64, hidden_size=32, vocab_size=64, **options)


def after(model: Any, first: int) -> torch.Tensor:
    """Logits of tokens that begin at a position."""
    positions = torch.arange(first, first + IDS.shape[1])[None]
    return model(input_ids=IDS, position_ids=positions).logits


def test_learned_positions_begin_behind_the_prefix() -> None:
    model, prefix = make(), torch.arange(3, 23)[None]
    states = prefix_states(model, prefix)
    whole = model(input_ids=torch.cat([prefix, IDS], 1)).logits[:, 20:]
    without = (after(model, 20) - whole).abs().max()
    attach(model, Config(feature_map="taylor", degree=2), prefix=states)
    error = conversion_error(model, states, IDS).max_logit_error
    assert (after(model, 20) - whole).abs().max().item() == pytest.approx(error, abs=1e-12)
    assert error < 0.1 * without


def test_a_peft_prefix_of_learned_positions_is_that_prefix() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    expected = model(input_ids=IDS).logits
    states = peft_prefix_states(model)
    base = attach(model.get_base_model(), Config(feature_map="taylor", degree=3), prefix=states)
    error = conversion_error(base, states, IDS).max_logit_error
    assert (after(base, 10) - expected).abs().max().item() == pytest.approx(error, abs=1e-12)


def test_a_prefix_and_inputs_of_more_positions_than_there_are_are_refused() -> None:
    model = make(max_position_embeddings=48)
    states = prefix_states(model, list(range(43)))
    attach(model, prefix=states)
    with pytest.raises(InvalidBatchError, match="need 49 positions, and the model has 48"):
        conversion_error(model, states, IDS)
    conversion_error(model, states, IDS[:, :5])


def test_a_cache_of_latents_is_refused_by_name() -> None:
    model = make("deepseek_v3")
    states = prefix_states(model, [1, 2, 3])
    attach(model, prefix=states)
    with pytest.raises(UnsupportedModelError, match=r"'deepseek_v3'.*\(latent"):
        conversion_error(model, states, IDS)


def test_a_prefix_of_another_model_object_is_refused() -> None:
    model = make("llama")
    other, states = copy.deepcopy(model), prefix_states(model, [1, 2, 3])
    for wrong in (states, {}):
        with pytest.raises(InvalidBatchError, match="call prefix_states"):
            attach(other, prefix=wrong)
    assert not is_enabled(other)
    assert adapter_names(other) == []
    attach(other)
    with pytest.raises(InvalidBatchError, match="call prefix_states"):
        conversion_error(other, states, IDS)
    detach(other)
    attach(other, prefix=prefix_states(other, [1, 2, 3]))
