"""Compiled, offloaded and meta models: scored as they are, or refused by their right name."""

import pytest
import torch

import stemma
from decoders import SIZES, random_tree
from stemma.models.tiny import tiny_model

ROWS = [list(range(5, 40)), [*range(5, 30), 9, 8]]


def llama(**options):
    return tiny_model("llama", **SIZES, seed=0, **options)


@pytest.mark.parametrize("first", ["enable", "compile"])
def test_a_compiled_model_is_scored_as_it_was_before(first):
    model, tree = llama(), random_tree()
    if first == "enable":
        compiled = torch.compile(stemma.enable(model), backend="eager")
    else:
        compiled = stemma.enable(torch.compile(model, backend="eager"))
    for mode in ("shared", "plain"):
        wanted = stemma.score(model, tree, mode=mode)
        found = stemma.score(compiled, tree, mode=mode)
        assert torch.equal(found.logprobs, wanted.logprobs)
    stemma.backward(compiled, tree, lambda scores: scores.logprobs.sum(), mode="shared", max_tokens=12)
    wanted = stemma.generate(model, None, ROWS, max_new_tokens=4)
    assert stemma.generate(compiled, None, ROWS, max_new_tokens=4).token_ids == wanted.token_ids
    prefix = stemma.SharedPrefix.from_ids(compiled, ROWS[0])
    assert torch.equal(
        prefix.context()[model.model.layers[1].self_attn][0],
        stemma.SharedPrefix.from_ids(model, ROWS[0]).context()[model.model.layers[1].self_attn][0],
    )


def test_an_enabled_model_is_compiled_for_ordinary_calls():
    model, ids = stemma.enable(llama()), torch.tensor(ROWS[:1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("what", ["in place", "a layer"])
def test_compiled_parts_are_refused_by_name(what):
    model = llama()
    if what == "in place":
        model.compile(backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    with pytest.raises(stemma.UnsupportedModelError, match="is compiled"):
        stemma.enable(model)
    stemma.enable(model, self_test=False)
    with pytest.raises(stemma.UnsupportedModelError, match="is compiled"):
        stemma.score(model, random_tree(), mode="shared")


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_scored_where_they_run(where, tmp_path):
    import accelerate

    tree, wanted = random_tree(), stemma.score(stemma.enable(llama()), random_tree(), mode="shared").logprobs
    model = llama()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    stemma.enable(model)
    with torch.no_grad():
        for mode, max_tokens in (("shared", None), ("shared", 12), ("plain", None)):
            found = stemma.score(model, tree, mode=mode, max_tokens=max_tokens).logprobs
            torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-5)
    stemma.generate(model, None, ROWS, max_new_tokens=2)


def test_meta_weights_are_planned_and_not_scored():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama().config)
    stemma.enable(model)
    assert stemma.explain(model, random_tree()).mode == "shared"
    for mode in ("auto", "shared", "plain"):
        with pytest.raises(stemma.UnsupportedModelError, match="meta device"):
            stemma.score(model, random_tree(), mode=mode)
    with pytest.raises(stemma.UnsupportedModelError, match="meta device"):
        stemma.SharedPrefix.from_ids(model, [1, 2])
