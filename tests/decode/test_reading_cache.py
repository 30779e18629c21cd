"""What caches that answer queries themselves have in common: whose they are, and copies of them."""

import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch

import stemma
from decoders import decoder
from stemma.census import build
from stemma.decode.compressed_cache import CompressedCache
from stemma.decode.prompts import pad_left
from stemma.decode.shared_cache import SharedPrefixCache

ROWS = [[5, 6, 7], [5, 6, 8]]
CACHES = pytest.mark.parametrize("make", [SharedPrefixCache.of, CompressedCache.prefill])


def options(make, model):
    """Rows to feed behind what the cache of `ROWS` holds, which is all tokens or all but the last."""
    cache = make(model, ROWS)
    ids = torch.tensor([[*row, 1] for row in ROWS])
    return cache, {"input_ids": ids[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(ids)}


@CACHES
def test_another_model_does_not_read_the_cache(make):
    cache, inputs = options(make, decoder())
    with pytest.raises(stemma.InvalidBatchError, match="made with another model"), torch.no_grad():
        decoder()(**inputs, past_key_values=cache)  # equal weights, other modules


@CACHES
def test_a_copied_cache_goes_on_by_itself_with_the_same_model(make):
    model = decoder()
    cache, inputs = options(make, model)
    seen = cache.get_seq_length()
    twin = deepcopy(cache)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=twin).logits
        assert (cache.get_seq_length(), twin.get_seq_length()) == (seen, 4)
        assert torch.equal(model(**inputs, past_key_values=cache).logits, logits)
        expected = model(torch.tensor([[*row, 1] for row in ROWS])).logits[:, -1]
    torch.testing.assert_close(logits[:, -1], expected, rtol=0, atol=1e-4)


@CACHES
def test_a_cache_ends_with_its_last_use(make):
    model = decoder()
    gc.disable()
    try:
        cache, inputs = options(make, model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        alive = weakref.ref(cache)
        twin = deepcopy(cache)
        del cache
        assert alive() is None
        assert twin.layers[0].owner() is twin
    finally:
        gc.enable()


@CACHES
def test_rows_of_different_lengths_need_a_model_that_is_told_positions(make):
    """`generate` hands positions over by name only, and would count these from the padding."""
    model = stemma.enable(build("whisper", torch.float32))
    rows, ids = [[5, 6, 7, 8], [9]], torch.tensor([[5, 6, 7, 8, 1], [0, 0, 0, 9, 1]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def go_on():
        cache = make(model, rows)
        model(input_ids=ids[:, cache.get_seq_length() :], attention_mask=mask, past_key_values=cache)

    with pytest.raises(stemma.UnsupportedModelError, match="takes no position_ids"):
        go_on()


@CACHES
@pytest.mark.parametrize("assisted", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_assisted_decoding_is_refused(make, assisted):
    model = decoder()
    cache, inputs = options(make, model)
    mask = inputs["attention_mask"][:1]
    value = decoder() if assisted == "assistant_model" else 1
    with pytest.raises(ValueError, match=f"{type(cache).__name__} is not made for assisted decoding"):
        model.generate(
            torch.tensor([[*ROWS[0], 1]]),
            attention_mask=mask,
            past_key_values=make(model, ROWS[:1]),
            max_new_tokens=4,
            **{assisted: value},
        )


@CACHES
def test_new_tokens_can_be_taken_back_and_nobody_else_asks_to(make):
    model = decoder()
    cache, inputs = options(make, model)
    seen = cache.get_seq_length()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    cache.crop(-1)
    assert cache.get_seq_length() == 3 >= seen
    assert not cache.is_croppable  # as transformers would begin with activate_past_recording


@CACHES
def test_gradient_checkpointing_which_drops_caches_is_refused(make):
    model = decoder()
    model.gradient_checkpointing_enable()
    make(model.eval(), [[5, 6, 7], [5]])
    with pytest.raises(stemma.UnsupportedModelError, match="gradient checkpointing is on in train mode"):
        make(model.train(), [[5, 6, 7], [5]])
    model.gradient_checkpointing_disable()
    make(model, [[5, 6, 7], [5]])


# ---------------------------------------------------------------------- what goes on with a cache


PROMPTS = [[5, 6, 7, 8], [6, 7]]


def batch(rows):
    return dict(zip(("input_ids", "attention_mask"), pad_left(rows, 0, "cpu"), strict=True))


def further(model, rows, cache=None, new=4):
    """New tokens of greedy decoding, transformers' own without a cache of ours."""
    inputs = batch(rows)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@CACHES
def test_a_used_cache_goes_on_with_its_own_rows(make):
    model = decoder()
    asked = [[*row, 9, 3] for row in PROMPTS]
    cache = make(model, PROMPTS)
    first = further(model, asked, cache)
    assert first == further(model, asked)
    going_on = [[*row, *new, 4] for row, new in zip(asked, first, strict=True)]
    assert further(model, going_on, cache) == further(model, going_on)
    again = [[*row, 2] for row in PROMPTS]  # shorter than what was asked before
    cache.reset()
    second = further(model, again, cache)
    assert second == further(model, again)
    cache.crop(-2)  # of the four new tokens it holds three
    cropped = [[*row, new[0], 8] for row, new in zip(again, second, strict=True)]
    assert further(model, cropped, cache) == further(model, cropped)


@CACHES
@pytest.mark.parametrize(
    ("question", "words"),
    [
        ([1], "nothing new to go on from"),  # shorter
        ([1, 2, 3], "nothing new to go on from"),  # as long as what the cache holds
        ([1, 2, 3, 4, 5, 6, 7], "row 0 does not continue what the cache holds: its token 4 is 1, and in the cache"),
        ([9, 3, 0, 0, 0, 6, 7], "row 0 does not continue what the cache holds: its token 6 is 0"),
    ],
)
def test_a_used_cache_is_not_asked_another_question(make, question, words):
    model = decoder()
    cache = make(model, PROMPTS)
    further(model, [[*row, 9, 3] for row in PROMPTS], cache, new=3)
    with pytest.raises(stemma.InvalidBatchError, match=rf"{words}.*cache\.reset\(\) first"):
        further(model, [[*row, *question] for row in PROMPTS], cache)
    cache.reset()
    asked = [[*row, *question] for row in PROMPTS]
    assert further(model, asked, cache) == further(model, asked)


@CACHES
def test_rows_are_those_of_the_cache_from_the_first_call_on(make):
    model = decoder()
    with pytest.raises(stemma.InvalidBatchError, match="row 0 does not continue"):
        further(model, [[7, 6, 5, 8, 1], [6, 7, 1]], make(model, PROMPTS))
    with pytest.raises(stemma.InvalidBatchError, match="row 0 does not continue"):
        further(model, [[5, 6, 7, 8, 1], [5, 6, 8, 7, 1]], make(model, [[5, 6, 8, 7], [5, 6, 7, 8]]))
    with pytest.raises(stemma.InvalidBatchError, match="made for 2 rows, and 3 were given"):
        further(model, [[5, 6, 7, 8, 1]] * 3, make(model, PROMPTS))
    cache = make(model, PROMPTS)
    cache.batch_select_indices(torch.tensor([1, 0]))
    asked = [[*row, 2] for row in PROMPTS[::-1]]
    assert further(model, asked, cache) == further(model, asked)
    cache = make(model, PROMPTS)
    with torch.no_grad():  # tokens of a forward call are not known, those before and behind it are
        ids, mask = pad_left([[*row, 3] for row in PROMPTS], 0, "cpu")
        positions, new = (mask.cumsum(1) - 1).clamp(min=0), slice(cache.get_seq_length(), None)
        model(ids[:, new], attention_mask=mask, position_ids=positions[:, new], past_key_values=cache)
    asked = [[*row, 3, 4] for row in PROMPTS]
    assert further(model, asked, cache) == further(model, asked)


@CACHES
def test_a_model_that_is_no_longer_enabled_does_not_read_a_cache(make):
    model = decoder()
    cache = make(model, PROMPTS)
    asked = batch([[*row, 3] for row in PROMPTS])
    stemma.disable(model)
    with pytest.raises(stemma.UnsupportedModelError, match=r"not enabled.*stemma\.enable\(model\)"):
        model.generate(**asked, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(stemma.UnsupportedModelError, match=r"not enabled.*stemma\.enable\(model\)"), torch.no_grad():
        model(**asked | {"input_ids": asked["input_ids"][:, cache.get_seq_length() :]}, past_key_values=cache)
    returned = stemma.generate(model, None, PROMPTS, max_new_tokens=2, return_dict_in_generate=True).output
    with pytest.raises(stemma.UnsupportedModelError, match=r"not enabled.*stemma\.enable\(model\)"):
        model.generate(returned.sequences, past_key_values=returned.past_key_values, max_new_tokens=2)


@CACHES
def test_a_model_that_has_made_a_cache_is_copied_pickled_and_freed_as_any(make):
    model = decoder()
    make(model, PROMPTS)
    expected = further(model, PROMPTS)
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert further(twin, PROMPTS) == expected
        asked = [[*row, 2] for row in PROMPTS]
        assert further(twin, asked, make(twin, PROMPTS)) == further(model, asked)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
