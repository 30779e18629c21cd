"""The cache of shared prefixes: exact logits on every supported type, its contract, and its guards."""

import numpy as np
import pytest
import torch
import transformers

import stemma
from decoders import KINDS, V, cached, decoder, keep_double
from stemma.census import build, model_types
from stemma.census.decoding import decode_difference
from stemma.census.measure import KeepDouble
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.models.tiny import tiny_model

transformers.logging.set_verbosity_error()

QUICK = ("llama", "qwen3_moe", "mistral", "gemma2", "gpt_oss", "gpt2", "deepseek_v3", "cohere2", "opt", "phi3")
"""One for each of: grouped heads, experts, windows, soft-caps, sinks, learned positions, latent attention."""


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in model_types()]
)
def test_float64_logits_are_those_of_each_row_alone_or_the_type_is_refused(model_type):
    try:
        model = build(model_type, torch.float64)
        with KeepDouble():
            stemma.disable(stemma.enable(model))
    except (stemma.UnsupportedModelError, ValueError, AttributeError, TypeError, KeyError) as error:
        assert model_type not in QUICK
        pytest.skip(str(error)[:100])
    with KeepDouble(), torch.no_grad():
        try:
            difference = decode_difference(model)
        except stemma.UnsupportedModelError as refusal:
            assert model_type not in QUICK
            pytest.skip(str(refusal)[:100])
    assert difference <= 1e-12


def random_rows(random, vocabulary=V):
    """Prompts of a random tree: one to four levels, unequal groups, duplicates, prompts inside others."""

    def run(n):
        return random.integers(0, vocabulary, n).tolist()

    level = [[]]
    for _ in range(random.integers(1, 5)):
        level = [above + run(random.integers(1, 13)) for above in level for _ in range(random.integers(1, 4))][:8]
    rows = level + [row[: random.integers(1, len(row) + 1)] for row in level[:2]] + [level[0]]
    return [rows[i] for i in random.permutation(len(rows))]


def soak(seed):
    """Decode a random tree, with rows that leave, are repeated, and change places, against each row alone."""
    random = np.random.default_rng(seed)
    model = cached(list(KINDS)[seed % len(KINDS)])
    rows = random_rows(random)
    prefix, head = None, []
    if random.random() < 0.4:
        head = random.integers(0, V, random.integers(1, 20)).tolist()
        cut = int(random.integers(0, len(head)))
        prefix = stemma.SharedPrefix.from_ids(model, head[cut:] if cut == 0 else head[:cut])
        prefix = prefix.extend(head[cut:]) if cut else prefix
    cache = SharedPrefixCache.of(
        model,
        rows,
        prefix=prefix,
        room=int(random.integers(1, 6)),
        call_bytes=int(random.choice([0, 3000, 20000, 1 << 18])),
        min_shared=int(random.integers(1, 9)),
        max_tokens=None if random.random() < 0.5 else int(random.integers(8, 40)),
    )
    whole = [head + row for row in rows]
    longest = max(map(len, whole))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in whole])
    fed = torch.tensor([[row[-1]] for row in whole])
    for _ in range(4):
        positions = (mask.cumsum(1) - 1)[:, -fed.shape[1] :]
        got = model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        for row, logits in zip(whole, got, strict=True):
            expected = model(torch.tensor([row])).logits[0, -fed.shape[1] :]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        action = random.random()
        if action < 0.5:
            index = torch.from_numpy(random.integers(0, len(whole), random.integers(1, len(whole) + 1)))
            if action < 0.2:
                cache.reorder_cache(index)
            else:
                cache.batch_select_indices(index)
            whole, mask = [whole[i] for i in index], mask[index]
        elif action < 0.6:
            cache.batch_repeat_interleave(2)
            whole, mask = [row for row in whole for _ in range(2)], mask.repeat_interleave(2, 0)
        new = int(random.integers(1, 4))
        fed = torch.from_numpy(random.integers(0, V, (len(whole), new)))
        whole = [row + tokens for row, tokens in zip(whole, fed.tolist())]
        mask = torch.cat([mask, mask.new_ones(len(whole), new)], 1)


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(n, marks=pytest.mark.slow) for n in range(16, 200))])
def test_soak_of_random_trees(seed):
    with keep_double(), torch.no_grad():
        soak(seed)


# ---------------------------------------------------------------------- contract


def filled(model, steps=3, rows=None, **options):
    rows = rows or [list(range(2, 30)), [*range(2, 25), 7, 8]]
    cache = SharedPrefixCache.of(model, rows, call_bytes=0, **options)
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    step(model, cache, torch.tensor([[row[-1]] for row in rows]), mask)
    for token in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        step(model, cache, torch.full((len(rows), 1), 40 + token), mask)
    return cache, mask


@torch.no_grad()
def step(model, cache, ids, mask):
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


def test_lengths_crop_and_reset():
    model = cached("llama, grouped queries")
    cache, mask = filled(model, 3)
    assert cache.get_seq_length() == 27 + 4
    expected = step(model, filled(model, 1)[0], torch.tensor([[9], [9]]), mask[:, :30])
    cache.crop(-2)
    assert cache.get_seq_length() == 29
    assert torch.equal(step(model, cache, torch.tensor([[9], [9]]), mask[:, :30]), expected)
    for wrong in (-4, 1):
        with pytest.raises(ValueError, match="of which there are 3"):
            cache.crop(wrong)
    cache.reset()
    assert cache.get_seq_length() == 27
    first = step(model, SharedPrefixCache.of(model, [list(range(2, 30)), [*range(2, 25), 7, 8]]), *last(mask))
    torch.testing.assert_close(step(model, cache, *last(mask)), first)


def last(mask):
    return torch.tensor([[29], [8]]), mask[:, :28]


def test_shared_tensors_are_never_written():
    model = cached("mistral, window 5")
    cache = SharedPrefixCache.of(model, [list(range(2, 30))] * 3, call_bytes=0)
    before = [(x.clone(), x._version) for runs in cache.states._runs.values() for run in runs for x in run]
    mask = torch.ones(3, 28, dtype=torch.int64)
    step(model, cache, torch.tensor([[29]] * 3), mask)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.reset()
    after = [x for runs in cache.states._runs.values() for run in runs for x in run]
    assert all(torch.equal(a, b) and version == b._version for (a, version), b in zip(before, after, strict=True))


def test_prefix_bytes_are_counted_once_whatever_the_batch():
    model = cached("llama, grouped queries")
    sizes = set()
    for rows in (2, 32):
        cache = SharedPrefixCache.of(model, [list(range(2, 60)) * 4] * rows, call_bytes=0, room=4)
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for runs in cache.states._runs.values()
            for run in runs
            for x in run
        }
        sizes.add(sum(storages.values()))
        assert cache.states.prefix_bytes == sum(storages.values())
        assert cache.states.own_bytes == 0
    assert sizes == {(58 * 4 - 1) * 2 * 2 * 2 * 8 * 8}  # tokens; keys and values; layers; key heads; size; bytes


def test_a_kernel_reads_a_prefix_once_for_all_rows(monkeypatch):
    from stemma.attention import decode

    calls, original = [], decode.block_forward
    monkeypatch.setattr(decode, "block_forward", lambda q, k, *a, **o: calls.append(k.shape) or original(q, k, *a, **o))
    model = cached("llama, grouped queries")
    cache = SharedPrefixCache.of(model, [list(range(2, 60))] * 8, call_bytes=0)
    step(model, cache, torch.tensor([[59]] * 8), torch.ones(8, 58, dtype=torch.int64))
    assert calls == [(8, 2, 1, 8), (1, 2, 57, 8)] * 2  # per layer the own token of each row, and the prefix once


# ---------------------------------------------------------------------- guards


def test_masks_and_rows_that_do_not_fit_are_refused():
    model = cached("llama, grouped queries")
    rows = [list(range(2, 30)), [5, 6, 7]]
    ids, mask = torch.tensor([[29], [7]]), torch.tensor([[1] * 28, [0] * 25 + [1] * 3])

    def cache():
        return SharedPrefixCache.of(model, rows)

    with pytest.raises(stemma.InvalidBatchError, match="different lengths"), torch.no_grad():
        model(ids, past_key_values=cache(), use_cache=True)
    with pytest.raises(stemma.InvalidBatchError, match=r"must be \(2, 28\)"):
        step(model, cache(), ids, mask[:, 1:])
    with pytest.raises(stemma.InvalidBatchError, match="hides other tokens"):
        step(model, cache(), ids, torch.ones_like(mask))
    with pytest.raises(stemma.InvalidBatchError, match="made for 2 rows, and 1 were given"):
        step(model, cache(), ids[:1], mask[:1])
    with pytest.raises(stemma.InvalidBatchError, match="no rows"):
        SharedPrefixCache.of(model, [])
    with pytest.raises(stemma.InvalidBatchError, match="row 1 is empty"):
        SharedPrefixCache.of(model, [[5], []])


def test_rows_take_their_padding_with_them():
    """A mask may be left out as long as no row of those present is padded."""
    model = cached("llama, grouped queries")
    rows, ids = [list(range(2, 30)), [5, 6, 7]], torch.tensor([[29], [7]])
    whole, short = (SharedPrefixCache.of(model, rows) for _ in range(2))
    whole.batch_select_indices(torch.tensor([0, 0]))
    with torch.no_grad():
        got = model(ids[[0, 0]], past_key_values=whole, use_cache=True).logits
        expected = model(torch.tensor(rows[:1])).logits[:, -1:].expand_as(got)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        short.reorder_cache(torch.tensor([1]))
        with pytest.raises(stemma.InvalidBatchError, match="different lengths"):
            model(ids[1:], past_key_values=short, use_cache=True)


def test_chunks_are_counted_from_the_first_token_of_a_row():
    """No row is longer than a chunk, so chunked attention is causal, if one does not count the padding."""
    options = {"attention_chunk_size": 32, "num_local_experts": 2, "moe_layers": [], "attn_temperature_tuning": False}
    model = stemma.enable(tiny_model("llama4_text", vocab_size=64, **options).double())
    rows = [[5, 6, 7], list(range(2, 30))]
    mask = torch.tensor([[0] * 25 + [1] * 3, [1] * 28])
    got = step(model, SharedPrefixCache.of(model, rows), torch.tensor([[7], [29]]), mask)
    for row, logits in zip(rows, got, strict=True):
        torch.testing.assert_close(logits[-1], model(torch.tensor([row])).logits[0, -1], rtol=0, atol=1e-12)


def test_gradients_are_refused():
    model = cached("llama, grouped queries")
    cache = SharedPrefixCache.of(model, [[5, 6, 7]])
    with pytest.raises(stemma.UnsupportedModelError, match="no gradients"):
        model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)


def test_a_model_that_is_not_enabled_is_refused():
    model = stemma.disable(decoder())
    with pytest.raises(stemma.UnsupportedModelError, match=r"call stemma\.enable\(model\) first\. \(stemma\.score and"):
        SharedPrefixCache.of(model, [[5, 6, 7]])


def test_a_cache_made_in_inference_mode_is_filled_outside_it():
    model, ids, mask = cached("llama, grouped queries"), torch.tensor([[29]] * 2), torch.ones(2, 28, dtype=torch.int64)
    expected = step(model, SharedPrefixCache.of(model, [list(range(2, 30))] * 2, room=1), ids, mask)
    with torch.inference_mode():
        cache = SharedPrefixCache.of(model, [list(range(2, 30))] * 2, room=1)
    assert torch.equal(step(model, cache, ids, mask), expected)


def test_a_layer_that_attends_elsewhere_is_refused_by_name():
    """Its mask is made by hand, so nothing leads its attention to the cache."""
    model = decoder()
    cache = SharedPrefixCache.of(model, [[5, 6, 7]])
    options = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "position_ids": torch.tensor([[2]])}
    with pytest.raises(stemma.UnsupportedModelError, match=r"layer 0 of LlamaForCausalLM .* put its"), torch.no_grad():
        model(torch.tensor([[7]]), past_key_values=cache, use_cache=True, **options)


def test_a_mask_of_another_forward_in_between_is_not_taken_for_the_caches():
    model = cached("llama, grouped queries")
    cache = SharedPrefixCache.of(model, [[5, 6, 7]])
    cache.get_mask_sizes(1, 0)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits
        cache.get_mask_sizes(1, 0)
        assert torch.equal(model(torch.tensor([[5, 6]])).logits, expected)
