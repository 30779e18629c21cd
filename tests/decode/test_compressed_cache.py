"""The compressed cache on whole models: against one plain forward in which each layer masks what it dropped."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers

import stemma
from decoders import KINDS, V, cached, decoder, keep_double
from stemma.census import build
from stemma.census.measure import KeepDouble
from stemma.decode.compressed_cache import CompressedCache, DecodeBudget
from stemma.models.adapter import base_model
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.models.tiny import tiny_model

transformers.logging.set_verbosity_error()

LLAMA = "llama, grouped queries"
OTHERS = ("qwen3", "gemma3_text", "deepseek_v3", "opt", "phi3", "olmo2", "cohere2", "qwen3_moe")
"""Further types: normalised queries, two rotary bases, latent attention, learned positions, fused projections."""


def attention_modules(model):
    modules = [m for m in base_model(model).modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    return sorted((m for m in modules if "Attention" in type(m).__name__), key=lambda m: m.layer_idx)


@contextmanager
def hidden_keys(model, hidden):
    """A plain forward in which each layer also hides ``hidden[layer]``, a bool mask (queries, keys)."""

    def hook(module, args, kwargs):
        mask, more = kwargs["attention_mask"], hidden[module.layer_idx]
        n = more.shape[0]
        if mask is None:
            mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            kwargs["attention_mask"] = mask & ~more
        else:
            kwargs["attention_mask"] = mask.masked_fill(more, torch.finfo(mask.dtype).min)
        return args, kwargs

    stemma.disable(model)
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in attention_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stemma.enable(model, self_test=False)


def expected_logits(model, row, prompt, kept):
    """Logits (tokens, vocabulary) of one row whose layers hide from everything behind the prompt what they dropped."""
    hidden = {}
    for module in attention_modules(model):
        more = torch.zeros(len(row), len(row), dtype=torch.bool)
        if module.layer_idx in kept:
            gone = np.setdiff1d(np.arange(prompt), kept[module.layer_idx])
            more[prompt:, gone] = True
        hidden[module.layer_idx] = more
    with hidden_keys(model, hidden):
        return model(torch.tensor([row])).logits[0]


def rows_of(seed, lengths, vocabulary=V):
    random = np.random.default_rng(seed)
    return [random.integers(2, vocabulary, length).tolist() for length in lengths]


def random_keep(cache, seed, share=0.4):
    random = np.random.default_rng(seed)
    return [
        {
            layer: np.sort(random.choice(mass.size, max(1, int(share * mass.size)) + int(layer), replace=False))
            for layer, mass in row.items()
        }
        for row in cache.importance()
    ]


def feed(model, cache, mask, ids):
    """Logits of new tokens (rows, n), and the longer mask."""
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1])], 1)
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.logits, mask


def mask_of(rows):
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def check(model, lengths, seed=0, drop=True, steps=(1, 3, 1, 1), max_tokens=None, vocabulary=V):
    rows = rows_of(seed, lengths, vocabulary)
    cache = CompressedCache.prefill(model, rows, room=2, max_tokens=max_tokens)
    kept = (
        random_keep(cache, seed)
        if drop
        else [{layer: np.arange(mass.size) for layer, mass in row.items()} for row in cache.importance()]
    )
    cache.keep(kept)
    mask, new = mask_of(rows), rows_of(seed + 1, [sum(steps)] * len(rows), vocabulary)
    begin = 0
    for step in steps:
        got, mask = feed(model, cache, mask, torch.tensor([row[begin : begin + step] for row in new]))
        begin += step
        for index, (row, tail) in enumerate(zip(rows, new, strict=True)):
            expected = expected_logits(model, row + tail[:begin], len(row), kept[index])[-step:]
            torch.testing.assert_close(got[index], expected, rtol=0, atol=1e-12)
    cache.check_read()
    return cache


@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "some dropped"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_forward_that_masks_what_each_layer_dropped(kind, drop):
    with keep_double(), torch.no_grad():
        check(cached(kind), [23], drop=drop)


@pytest.mark.parametrize("kind", [LLAMA, "mistral, window 5", "gpt_oss, window 5, sinks", "gpt2, learned positions"])
def test_rows_of_a_padded_batch_are_rows_alone(kind):
    with keep_double(), torch.no_grad():
        for lengths, max_tokens in (([19, 4, 11], None), ([19, 4, 11], 5), ([4], None)):
            check(cached(kind), lengths, seed=3, max_tokens=max_tokens)


@pytest.mark.parametrize("model_type", OTHERS)
def test_further_types(model_type):
    model = build(model_type, torch.float64)
    with KeepDouble(), torch.no_grad():
        stemma.enable(model)
        check(model, [21, 13], vocabulary=int(model.config.vocab_size))


def test_everything_kept_gives_the_logits_of_the_plain_forward():
    model = cached(LLAMA)
    (row,) = rows_of(5, [30])
    with torch.no_grad():
        cache = CompressedCache.prefill(model, [row[:25]])
        cache.keep([{layer: np.arange(25) for layer in (0, 1)}])
        got, _ = feed(model, cache, torch.ones(1, 25, dtype=torch.int64), torch.tensor([row[25:]]))
        torch.testing.assert_close(got[0], model(torch.tensor([row])).logits[0, 25:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LLAMA, "gemma2, window 5, soft-caps", "gpt_oss, window 5, sinks"])
@pytest.mark.parametrize(("votes", "max_tokens"), [(None, None), (None, 7), (5, None), (5, 3)])
def test_importance_is_the_column_sum_of_eager_attention(kind, votes, max_tokens):
    model = decoder(kind)
    rows = rows_of(7, [17, 9])
    with keep_double(), torch.no_grad():
        cache = CompressedCache.prefill(model, rows, votes=votes, max_tokens=max_tokens)
        found = cache.importance()
        eager = stemma.disable(model)
        eager.set_attn_implementation("eager")
        for row, importance in zip(rows, found, strict=True):
            attentions = eager(torch.tensor([row]), output_attentions=True).attentions
            full = [layer for layer in range(2) if cache.windows[layer] is None]
            assert list(importance) == full
            for layer in full:
                expected = attentions[layer][0].mean(0)[-votes if votes else 0 :].sum(0)
                torch.testing.assert_close(torch.from_numpy(importance[layer]), expected, rtol=0, atol=1e-12)


def test_without_votes_nothing_is_weighed():
    cache = CompressedCache.prefill(cached(LLAMA), rows_of(0, [9]), votes=0)
    assert all((mass == 0).all() for mass in cache.importance()[0].values())
    assert cache._states[0].column_bytes == cache._states[0].token_bytes + 4


# ---------------------------------------------------------------------- windows


def test_layers_with_a_shorter_window_are_bounded_and_not_part_of_what_is_dropped():
    model = cached("gpt_oss, window 5, sinks")
    with keep_double(), torch.no_grad():
        cache = check(model, [20, 3], seed=8)
    windowed, full = sorted(cache.windows, key=lambda layer: cache.windows[layer] is None)
    assert cache.windows[windowed] == 5
    assert cache.bounded(windowed).tolist() == [True, False]  # the short row does not fill the window
    assert not cache.bounded(full).any()
    rows = cache.importance()
    assert [sorted(row) for row in rows] == [[full], sorted([windowed, full])]


def test_a_long_row_keeps_what_its_window_shows():
    model = cached("mistral, window 5")
    cache = CompressedCache.prefill(model, rows_of(0, [30]), room=3)
    assert not cache._states[0].mass.any()  # nothing to choose, so nothing was weighed
    cache.keep([{}])
    assert cache.positions(0) == [[26, 27, 28, 29]]
    report = cache.report()
    assert report.layers[0].window == 5
    assert report.kept_share == 0
    with torch.no_grad():
        mask = torch.ones(1, 30, dtype=torch.int64)
        for _ in range(40):
            _, mask = feed(model, cache, mask, torch.tensor([[7]]))
    assert cache._states[0].length <= 16


# ---------------------------------------------------------------------- contract


def compressed(model, rows, seed=0, **options):
    cache = CompressedCache.prefill(model, rows, **options)
    cache.keep(random_keep(cache, seed))
    return cache


@torch.no_grad()
def test_rows_can_leave_be_repeated_and_change_places():
    model, rows = cached(LLAMA), rows_of(2, [14, 9])
    cache = compressed(model, rows)
    kept = [cache.positions(0), cache.positions(1)]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.batch_size == 2
    assert [cache.positions(0), cache.positions(1)] == [[layer[1], layer[0]] for layer in kept]
    got, _ = feed(model, cache, mask_of(rows)[[1, 0]], torch.tensor([[4], [5]]))
    again = compressed(model, rows)
    expected, _ = feed(model, again, mask_of(rows), torch.tensor([[5], [4]]))
    assert torch.equal(got, expected[[1, 0]])


@torch.no_grad()
def test_new_tokens_can_be_cropped_and_forgotten():
    model, rows = cached(LLAMA), rows_of(2, [14, 9])
    cache = compressed(model, rows)
    first, mask = feed(model, cache, mask_of(rows), torch.tensor([[4, 5], [6, 7]]))
    cache.crop(-1)
    assert cache.get_seq_length() == 15
    again, _ = feed(model, cache, mask[:, :15], torch.tensor([[5], [7]]))
    torch.testing.assert_close(again[:, 0], first[:, 1], rtol=0, atol=1e-12)
    cache.reset()
    assert cache.get_seq_length() == 14
    repeated, _ = feed(model, cache, mask_of(rows), torch.tensor([[4, 5], [6, 7]]))
    assert torch.equal(repeated, first)
    with pytest.raises(ValueError, match="of which there are 2"):
        cache.crop(-3)


@torch.no_grad()
def test_a_budget_drops_the_least_attended_while_decoding():
    model, rows = cached(LLAMA), rows_of(2, [12])
    cache = CompressedCache.prefill(model, rows, room=2)
    cache.keep([{0: np.array([0, 4, 6, 11]), 1: np.array([0, 2, 5, 6, 8, 11])}], budget=DecodeBudget(3, 1, 2))
    mask, gone = mask_of(rows), {0: set(), 1: set()}
    for step in range(1, 25):
        before = [set(cache.positions(layer)[0]) for layer in (0, 1)]
        mass = {
            layer: dict(zip(cache.positions(layer)[0], cache._states[layer].mass[0].tolist(), strict=True))
            for layer in (0, 1)
        }
        _, mask = feed(model, cache, mask, torch.tensor([[5 + step]]))
        for layer, size in ((0, 4), (1, 6)):
            held = cache.positions(layer)[0]
            new = 12 + step - 1
            dropped = (before[layer] | {new}) - set(held)
            if step % 3:
                assert not dropped
            else:
                assert len(held) == size * (12 + step) // 12
                assert {0, new - 1, new} <= set(held)
                free = set(held) - {0, new - 1, new}
                # One more query has been weighed since; it hands out at most 1.
                assert not dropped or max(mass[layer][x] for x in dropped) <= min(mass[layer][x] for x in free) + 1
            assert not gone[layer] & set(held)  # what was dropped never comes back
            gone[layer] |= dropped
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(-1)


def test_report_counts_tokens_and_bytes():
    model, rows = cached(LLAMA), rows_of(2, [20, 10])
    cache = CompressedCache.prefill(model, rows, room=5)
    kept = [{0: np.arange(6), 1: np.arange(2)}, {0: np.arange(3), 1: np.arange(7)}]
    cache.keep(kept, retained={0: 0.5, 1: 0.25})
    report = cache.report()
    assert [layer.kept for layer in report.layers] == [4.5, 4.5]
    assert [layer.seen for layer in report.layers] == [15, 15]
    assert report.kept_share == 18 / 60
    token = 2 * 2 * 8 * 8  # keys and values, two heads of eight doubles
    assert report.whole_bytes == 2 * 30 * token
    assert [layer.bytes for layer in report.layers] == [2 * 6 * (token + 4), 2 * 7 * (token + 4)]
    assert report.kept_bytes == 2 * 13 * (token + 4)
    assert report.allocated_bytes == 2 * (13 + 2 * 5) * (token + 4)
    assert report.as_dict()["layers"][1]["retained_mass"] == 0.25
    assert "30.0% of the tokens kept" in str(report)
    assert len(str(report).splitlines()) == 4


# ---------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_before_work():
    model = cached(LLAMA)
    for rows, words in (
        ([], "no rows"),
        ([[1, 2], []], "row 1 is empty"),
        ([[V]], "outside the model's vocabulary"),
        ([[1] * 600], "512 positions"),
    ):
        with pytest.raises(stemma.InvalidBatchError, match=words):
            CompressedCache.prefill(model, rows)
    with pytest.raises(stemma.UnsupportedModelError, match=r"stemma\.enable"):
        CompressedCache.prefill(tiny_model("llama"), [[1, 2]])


def test_tokens_to_keep_are_checked():
    model, rows = cached(LLAMA), rows_of(2, [8, 6])
    cache = CompressedCache.prefill(model, rows)
    whole = {0: np.arange(6), 1: np.arange(6)}
    for wrong, words in (
        ([whole], "of 1 rows, for a cache of 2"),
        ([whole, {0: np.arange(6)}], r"row 1: tokens to keep are needed in layers \[0, 1\], not \[0\]"),
        ([whole, {0: np.arange(7), 1: np.arange(6)}], "row 1, layer 0: .* below 6"),
        ([whole, {0: np.array([2, 1]), 1: np.arange(6)}], "ascending"),
        ([whole, {0: np.array([], dtype=np.int64), 1: np.arange(6)}], "at least one"),
    ):
        with pytest.raises(stemma.InvalidBatchError, match=words):
            cache.keep(wrong)
    cache.keep([whole, whole])
    with pytest.raises(stemma.InvalidBatchError, match="compressed once"):
        cache.keep([whole, whole])


@torch.no_grad()
def test_masks_and_rows_that_do_not_fit_are_refused():
    model, rows = cached(LLAMA), rows_of(2, [8, 6])
    cache = compressed(model, rows)
    with pytest.raises(stemma.InvalidBatchError, match="needs the attention mask"):
        model(torch.tensor([[3], [4]]), past_key_values=cache)
    with pytest.raises(stemma.InvalidBatchError, match="hides other tokens"):
        feed(model, cache, torch.ones(2, 8, dtype=torch.int64), torch.tensor([[3], [4]]))
    with pytest.raises(stemma.InvalidBatchError, match="batch_repeat_interleave"):
        feed(model, compressed(model, rows[:1]), torch.ones(2, 8, dtype=torch.int64)[:, :8], torch.tensor([[3], [4]]))


def test_gradients_are_refused():
    model, rows = cached(LLAMA), rows_of(2, [8])
    cache = compressed(model, rows)
    with pytest.raises(stemma.UnsupportedModelError, match="no gradients"):
        feed(model, cache, mask_of(rows), torch.tensor([[3]]))


def test_a_layer_that_attends_elsewhere_is_refused_by_name(monkeypatch):
    model = decoder(LLAMA)
    _, second = attention_modules(model)

    def bypass(hidden_states, past_key_values=None, **kwargs):
        states = hidden_states.unflatten(-1, (4, 8))[:, :, :2].transpose(1, 2)
        past_key_values.update(states, states, second.layer_idx)
        return hidden_states, None

    monkeypatch.setattr(second, "forward", bypass)
    with pytest.raises(stemma.UnsupportedModelError, match=r"layer 1 of LlamaForCausalLM .* put its keys"):
        CompressedCache.prefill(model, rows_of(2, [8]))

    monkeypatch.setattr(second, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(stemma.UnsupportedModelError, match=r"layers \[1\] of LlamaForCausalLM .* did not attend"):
        CompressedCache.prefill(model, rows_of(2, [8]))


def test_a_layer_that_reads_the_keys_of_another_is_refused_by_name(monkeypatch):
    model = decoder(LLAMA)
    _, second = attention_modules(model)
    original = type(second).forward

    def shared(past_key_values=None, **kwargs):
        return original(second, past_key_values=None, **kwargs)

    monkeypatch.setattr(second, "forward", shared)
    with pytest.raises(stemma.UnsupportedModelError, match=r"layer 1\) of LlamaForCausalLM .* keys of another layer"):
        CompressedCache.prefill(model, rows_of(2, [8]))


def test_layers_without_keys_are_refused_by_name():
    model = decoder(LLAMA)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(stemma.UnsupportedModelError, match=r"layer 1 of LlamaForCausalLM .* linear_attention"):
        CompressedCache.prefill(model, rows_of(2, [8]))


def test_a_learned_prefix_is_refused():
    model = decoder(LLAMA)

    class Prefix(torch.nn.Module):
        def forward(self, query, scale):
            return torch.zeros_like(query), query.new_full(query.shape[:3], -1e9)

    attention_modules(model)[1].add_module(KERNEL_PREFIX, Prefix())
    with pytest.raises(stemma.UnsupportedModelError, match=r"layer 1\) has a learned prefix"):
        CompressedCache.prefill(model, rows_of(2, [8]))
