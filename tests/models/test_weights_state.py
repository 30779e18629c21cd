"""What a look at a model's tensors tells about changes of them, and what it does not."""

import pytest
import torch
import transformers

from stemma.models.tiny import tiny_model
from stemma.models.weights_state import unsaved_buffers, weights_state

transformers.logging.set_verbosity_error()


def llama(**options):
    return tiny_model("llama", vocab_size=258, **options)


def weight(model):
    return model.model.layers[1].mlp.up_proj.weight


def replace(model, tensor):
    weight(model).data = tensor


CHANGES = {
    "a counted write": lambda m: weight(m).detach().add_(1),
    "other memory": lambda m: replace(m, weight(m).data.clone()),
    "another precision": lambda m: m.to(torch.bfloat16),
    "another parameter": lambda m: setattr(
        m.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(weight(m).detach())
    ),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "another buffer": lambda m: m.model.rotary_emb.register_buffer(
        "inv_freq", m.model.rotary_emb.inv_freq.clone(), persistent=False
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    model = llama()
    before = weights_state(model)
    model(torch.tensor([[1, 2, 3]]))
    assert weights_state(model) == before
    CHANGES[change](model)
    assert weights_state(model) != before


def test_writes_past_the_count_are_not_seen_as_autograd_does_not_see_them():
    model = llama()
    before = weights_state(model)
    weight(model).data.mul_(2)
    assert weights_state(model) == before


def test_tensors_of_every_kind():
    module = llama()
    tensors = {
        "none": torch.zeros(0),
        "one": torch.ones(()),
        "eight": torch.ones(40).to(torch.float8_e4m3fn),
        "meta": torch.ones(3, device="meta"),
    }
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    module.register_buffer("empty", None)
    with torch.inference_mode():
        module.register_buffer("uncounted", torch.ones(3))
    before = weights_state(module)
    assert weights_state(module) == before
    tensors["one"].zero_()
    assert weights_state(module) != before


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_a_forward_sets_are_no_change(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4}
    if rope_type == "longrope":
        rope |= {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 16}
    model = llama(max_position_embeddings=64 if rope_type == "longrope" else 16, rope_parameters=rope)
    model(torch.ones(1, 8, dtype=torch.int64))
    before, frequencies = weights_state(model), model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.ones(1, 40, dtype=torch.int64))
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert weights_state(model) == before
    assert "model.rotary_emb.inv_freq" not in dict(unsaved_buffers(model))


def test_unsaved_buffers_are_those_no_checkpoint_has():
    model = llama()
    names = {name for name, _ in unsaved_buffers(model)}
    assert "model.rotary_emb.inv_freq" in names
    assert not names & set(model.state_dict())
