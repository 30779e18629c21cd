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
    "a write past the count": lambda m: weight(m).data.mul_(2),
    "other memory": lambda m: replace(m, weight(m).data.clone()),
    "another precision": lambda m: m.to(torch.bfloat16),
    "another parameter": lambda m: setattr(
        m.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(weight(m).detach())
    ),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a buffer past the count": lambda m: m.model.rotary_emb.inv_freq.data.mul_(2),
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


def test_the_first_value_and_some_behind_it_are_looked_at():
    model = llama()
    flat = weight(model).data.flatten()
    for place in (0, slice(100, 100 + flat.numel() // 15)):
        before = weights_state(model)
        flat[place] += 1
        assert weights_state(model) != before
    before = weights_state(model)
    flat[1] += 1  # between two of those looked at
    assert weights_state(model) == before


def test_tensors_without_a_count():
    with torch.inference_mode():
        model = llama()
    state = weights_state(model)
    assert state == weights_state(model)
    with torch.inference_mode():
        assert state == weights_state(model)
        weight(model).mul_(2)
    assert state != weights_state(model)


def test_tensors_of_every_kind():
    module = llama()
    tensors = {
        "none": torch.zeros(0),
        "one": torch.ones(()),
        "bits": torch.ones(40, dtype=torch.bool),
        "eight": torch.ones(40).to(torch.float8_e4m3fn),
        "turned": torch.ones(6, 8).T,
        "gaps": torch.ones(6, 8)[:, ::3],
        "shared": torch.ones(1, 3).expand(5, 3),
        "complex": torch.ones(3, dtype=torch.complex64),
        "nan": torch.full((3,), float("nan")),
        "meta": torch.ones(3, device="meta"),
    }
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    module.register_buffer("empty", None)
    before = weights_state(module)
    assert weights_state(module) == before
    for name in ("one", "bits", "eight", "turned", "gaps", "complex"):
        tensors[name].data.zero_()
        assert weights_state(module) != before, name
        before = weights_state(module)


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
