"""What caches that answer queries themselves have in common: whose they are, and copies of them."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch

import stemma
from decoders import decoder
from stemma.census import build
from stemma.decode.compressed_cache import CompressedCache
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
