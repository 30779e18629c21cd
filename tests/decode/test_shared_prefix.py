"""A prefix handle: refused when its model is not what it was, a value when it is copied, of any number of steps."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch

import stemma
from stemma.decode.shared_prefix import encode_tree
from stemma.models.tiny import tiny_model

IDS = [5, 9, 31, 7, 40, 12]


def llama(dtype=torch.float64, **options):
    return stemma.enable(tiny_model("llama", vocab_size=258, seed=0, dtype=dtype, **options))


def generated(model, prefix):
    return stemma.generate(model, None, [[3, 4], [3, 9, 11]], max_new_tokens=4, prefix=prefix).token_ids


def written(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)


def other_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


CHANGES = {
    "weights": written,
    "other memory": other_memory,
    "rounded": lambda model: model.bfloat16().double(),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(0.3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_refused(change):
    model = llama()
    prefix = stemma.SharedPrefix.from_ids(model, IDS)
    generated(model, prefix)
    prefix.check(model)
    CHANGES[change](model)
    with pytest.raises(stemma.InvalidBatchError, match="has changed since this prefix was encoded"):
        generated(model, prefix)


def autocast(wanted):
    return torch.autocast("cpu", torch.bfloat16) if wanted else nullcontext()


@pytest.mark.parametrize("inside", [False, True])
def test_a_prefix_of_another_autocast_is_refused(inside, tmp_path):
    model = llama(torch.float32)
    with autocast(inside):
        prefix = stemma.SharedPrefix.from_ids(model, IDS)
        generated(model, prefix)
        prefix.save_pretrained(tmp_path)
        stemma.SharedPrefix.from_pretrained(model, tmp_path)
    made, now = ("bfloat16", "float32") if inside else ("float32", "bfloat16")
    with autocast(not inside):
        with pytest.raises(stemma.InvalidBatchError, match=f"encoded in {made}, and the model now computes in {now}"):
            generated(model, prefix)
        with pytest.raises(stemma.InvalidDataError, match=rf"computed_in \({made}, here {now}\)"):
            stemma.SharedPrefix.from_pretrained(model, tmp_path)


def test_autocast_to_the_precision_of_the_model_changes_nothing():
    model = llama(torch.bfloat16)
    prefix = stemma.SharedPrefix.from_ids(model, IDS)
    with autocast(True):
        prefix.check(model)


def test_a_copy_is_the_prefix_itself():
    model = llama()
    prefix = stemma.SharedPrefix.from_ids(model, IDS).extend([8])
    assert copy.deepcopy(prefix) is prefix
    assert copy.copy(prefix) is prefix
    assert copy.deepcopy({"prefix": [prefix]})["prefix"][0] is prefix


def test_pickling_points_to_the_file_format():
    model = llama()
    prefix = stemma.SharedPrefix.from_ids(model, IDS)
    with pytest.raises(stemma.InvalidDataError, match=r"write it with prefix\.save_pretrained"):
        pickle.dumps(prefix)


def test_a_prefix_may_have_more_steps_than_python_has_frames():
    model = llama(num_hidden_layers=1, max_position_embeddings=4096)
    prefix = stemma.SharedPrefix.from_ids(model, [5])
    for _ in range(1100):  # as extend makes them, of the states of one token
        prefix = stemma.SharedPrefix(model, prefix, prefix.ids[:1], prefix._added())
    assert [step.length for step in prefix.path] == list(range(1, 1102))
    assert prefix.nbytes == 1101 * prefix.path[0].nbytes
    assert prefix.extend([6]).length == 1102


def test_parts_below_each_other_give_the_states_of_one_call():
    model = llama()
    rows = [[5, 9, 31, 7], [5, 9, 31, 8, 4], [5, 9, 2], [6, 1], [6, 1, 3, 3]]
    tree = stemma.PrefixTree.from_sequences(rows, min_shared=1)
    whole, parts = encode_tree(model, tree), encode_tree(model, tree, max_tokens=2)
    for module, pair in whole.items():
        for one, other in zip(pair, parts[module], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_what_inference_mode_made_serves_outside_it():
    model = llama()
    expected = generated(model, stemma.SharedPrefix.from_ids(model, IDS))
    with torch.inference_mode():
        prefix = stemma.SharedPrefix.from_ids(model, IDS)
    assert not any(x.is_inference() for pair in prefix.states.values() for x in pair)
    assert generated(model, prefix) == expected
    with torch.inference_mode():
        assert generated(model, prefix) == expected
