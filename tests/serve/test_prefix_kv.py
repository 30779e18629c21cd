"""PrefixKV: what is kept, profiles, refusals, and `generate`."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers

import stemma
from decoders import SIZES, V, cached, decoder
from stemma.cache.compressed import priority, retained_mass
from stemma.decode.compressed_cache import CompressedCache
from stemma.models.tiny import tiny_model
from stemma.serve.prefix_kv import Config, Profile, _importance, calibrate, compress, drop
from stemma.serve.prefix_kv.budget import waterline

transformers.logging.set_verbosity_error()

LLAMA = "llama, grouped queries"
DEEP = {"num_hidden_layers": 4}


def deep(seed=0):
    """Four layers that differ in how concentrated their attention is."""
    model = decoder(LLAMA, **DEEP)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight.data *= 0.2 + 0.6 * ((index + seed) % 4)
    return model


def rows_of(seed, lengths):
    random = np.random.default_rng(seed)
    return [random.integers(2, V, length).tolist() for length in lengths]


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, (torch.arange(longest) >= torch.tensor([longest - len(row) for row in rows])[:, None]).long()


# ---------------------------------------------------------------------- what is kept


CONFIGS = {
    "PrefixKV": {"score": "observed"},
    "uniform": {"allocation": "uniform", "score": "observed"},
    "normalized": {},
    "StreamingLLM": {"allocation": "uniform", "score": "recent", "protect_first": 4},
    "SnapKV": {"allocation": "uniform", "score": "window", "window": 6},
    "PyramidKV": {"allocation": "pyramid", "score": "window", "window": 6},
    "random": {"allocation": "uniform", "score": "random"},
    "decoding": {"drop_every": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_budgets_are_met_exactly_in_every_row_and_rows_are_as_if_alone(name):
    model, rows = deep(), rows_of(1, [40, 23, 31])
    config = Config(keep=0.37, **CONFIGS[name])
    cache = compress(model, rows, config)
    kept = [cache.positions(layer) for layer in range(4)]
    for index, row in enumerate(rows):
        assert sum(len(layer[index]) for layer in kept) == int(Fraction("0.37") * 4 * len(row))
        alone = compress(model, [row], config)
        assert [alone.positions(layer)[0] for layer in range(4)] == [layer[index] for layer in kept]
        first, last = config.protected
        edges = {*range(first), *range(len(row) - last, len(row))}
        assert all(edges <= set(layer[index]) for layer in kept)
    again = compress(model, rows, config, max_tokens=9)
    assert [again.positions(layer) for layer in range(4)] == kept


def test_every_setting_keeps_something_else():
    model, rows = deep(), rows_of(1, [40])
    kept = {
        name: tuple(tuple(compress(model, rows, Config(keep=0.4, **options)).positions(n)[0]) for n in range(4))
        for name, options in CONFIGS.items()
        if name != "decoding"
    }
    seeded = compress(model, rows, Config(keep=0.4, seed=1, **CONFIGS["random"]))
    kept["another seed"] = tuple(tuple(seeded.positions(n)[0]) for n in range(4))
    assert len(set(kept.values())) == len(kept)
    assert kept["StreamingLLM"][0] == (*range(4), *range(28, 40))


def test_kept_tokens_are_the_most_attended_and_sizes_those_of_the_waterline():
    model, (row,) = deep(), rows_of(2, [50])
    (mass,) = CompressedCache.prefill(model, [row]).importance()
    orders = [priority(mass[layer], 1, 1) for layer in range(4)]
    curves = [retained_mass(mass[layer], order) for layer, order in enumerate(orders)]
    sizes = waterline(curves, 60, 2)
    assert sizes.max() > sizes.min()
    cache = compress(model, [row], Config(keep=0.3, score="observed"))
    for layer in range(4):
        assert cache.positions(layer)[0] == sorted(orders[layer][: sizes[layer]].tolist())
    report = cache.report()
    retained = [layer.retained_mass for layer in report.layers]
    assert retained == [curve[size] for curve, size in zip(curves, sizes, strict=True)]
    uniform = compress(model, [row], Config(keep=0.3, allocation="uniform", score="observed")).report()
    assert min(retained) > min(layer.retained_mass for layer in uniform.layers)
    assert report.kept_bytes == uniform.kept_bytes
    assert compress(model, [row], Config(keep=0.3, **CONFIGS["random"])).report().layers[0].retained_mass is None


def test_scores_are_what_they_say():
    mass = np.array([4.0, 2.0, 2.0, 1.0, 0.0, 0.5, 0.5])
    assert np.array_equal(_importance(mass, 0, Config(score="observed")), mass)
    normalized = _importance(mass, 0, Config())
    np.testing.assert_allclose(normalized, [mass[j] / (7 - j) for j in range(7)])
    votes = _importance(mass, 0, Config(score="window"))
    np.testing.assert_allclose(votes, [mass[max(0, j - 2) : j + 3].sum() / 5 for j in range(7)])
    recent = _importance(mass, 0, Config(score="recent", allocation="uniform"))
    assert (np.diff(recent) > 0).all()
    drawn = [
        _importance(mass, n, Config(score="random", allocation="uniform", seed=s)) for n, s in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(each) for each in drawn}) == 3


def test_a_cache_filled_for_another_score_is_refused():
    model, rows = deep(), rows_of(1, [40])
    cache = CompressedCache.prefill(model, rows, votes=6)
    with pytest.raises(stemma.InvalidBatchError, match="needs a cache filled with votes=None, not 6"):
        drop(cache, Config())
    config = Config(score="window", window=6, keep=0.3)
    drop(cache, config)
    again = compress(model, rows, config)
    assert [cache.positions(n) for n in range(4)] == [again.positions(n) for n in range(4)]


def test_larger_shares_keep_a_superset_of_tokens_and_a_tiny_one_the_protected():
    model, rows = deep(), rows_of(3, [30])
    before = [set()] * 4
    for keep in (0.001, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0):
        cache = compress(model, rows, Config(keep=keep, protect_first=2))
        kept = [set(cache.positions(layer)[0]) for layer in range(4)]
        assert all(less <= more for less, more in zip(before, kept, strict=True))
        if keep == 0.001:
            assert kept == [{0, 1, 29}] * 4
        before = kept
    assert before == [set(range(30))] * 4


@torch.no_grad()
def test_everything_kept_is_a_no_op():
    model, rows = deep(), rows_of(4, [30, 20])
    ids, mask = padded([[*row, 9, 8, 7] for row in rows])
    cache = compress(model, rows, Config(keep=1))
    positions = (mask.cumsum(1) - 1)[:, -3:]
    got = model(ids[:, -3:], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
    for index, row in enumerate(rows):
        expected = model(torch.tensor([[*row, 9, 8, 7]])).logits[0, -3:]
        torch.testing.assert_close(got[index], expected, rtol=0, atol=1e-12)


def test_windowed_layers_are_left_whole_and_not_counted():
    model = cached("gpt_oss, window 5, sinks")
    cache = compress(model, rows_of(0, [40]), Config(keep=0.25))
    assert {window: len(cache.positions(layer)[0]) for layer, window in cache.windows.items()} == {5: 4, None: 10}
    for config in (Config(keep=0.5), Config(keep=0.5, score="window", window=3)):
        batch = compress(model, rows_of(0, [40, 5, 4]), config)  # a row that just fills the window is not bounded
        for index, row in enumerate(rows_of(0, [40, 5, 4])):
            alone = compress(model, [row], config)
            assert [alone.positions(n)[0] for n in (0, 1)] == [batch.positions(n)[index] for n in (0, 1)]
    with pytest.raises(stemma.InvalidBatchError, match="sliding window shorter than row 0"):
        compress(cached("mistral, window 5"), rows_of(0, [40]))


# ---------------------------------------------------------------------- generate


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def generate(model, rows, cache=None, **options):
    ids, mask = padded(rows)
    torch.manual_seed(5)
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, eos_token_id=1, pad_token_id=0, **options
    )


@pytest.mark.parametrize("mode", MODES)
def test_generate_runs_over_it(mode):
    model, rows = cached(LLAMA), rows_of(6, [20, 13])
    expected = generate(model, rows, **MODES[mode])
    repeats = max(MODES[mode].get("num_return_sequences", 1), MODES[mode].get("num_beams", 1))
    results = {}
    for keep in (1.0, 0.3):
        cache = compress(model, [row[:-1] for row in rows], Config(keep=keep))
        cache.batch_repeat_interleave(repeats)
        results[keep] = generate(model, rows, cache, **MODES[mode])
        cache.check_read()
    assert torch.equal(results[1.0], expected)
    assert results[0.3].shape[0] == expected.shape[0]
    assert not torch.equal(results[0.3], expected)


@torch.no_grad()
def test_beams_over_a_compressed_cache_are_those_of_forwards_one_by_one():
    """Beam search reorders rows; each of its sequences scores as if it had been decoded alone behind the same cache."""
    model, (row,) = cached(LLAMA), rows_of(6, [20])
    cache = compress(model, [row[:-1]], Config(keep=0.4))
    cache.batch_repeat_interleave(3)
    found = generate(
        model, [row], cache, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )
    for sequence, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        new = sequence[20:]
        new = new[: new.index(1) + 1] if 1 in new else new
        alone, total = compress(model, [row[:-1]], Config(keep=0.4)), 0.0
        for fed, wanted in zip([row[-1], *new], new):
            logits = model(torch.tensor([[fed]]), past_key_values=alone, use_cache=True).logits[0, -1]
            total += float(logits.log_softmax(-1)[wanted])
        assert score == pytest.approx(total / len(new), abs=1e-5)


@torch.no_grad()
def test_a_question_behind_a_compressed_document():
    model, (document,) = cached(LLAMA), rows_of(7, [30])
    cache = compress(model, [document], Config(keep=0.4))
    answers = []
    for question in rows_of(8, [5, 7]):
        answers.append(generate(model, [document + question], cache))
        cache.reset()
    assert torch.equal(answers[0], generate(model, [document + rows_of(8, [5, 7])[0]], cache))


def test_a_budget_while_decoding_bounds_the_cache():
    model, rows = cached(LLAMA), rows_of(9, [40])
    sizes = {}
    for every in (None, 1, 8):
        cache = compress(model, [rows[0][:-1]], Config(keep=0.25, drop_every=every))
        model.generate(
            torch.tensor(rows),
            past_key_values=cache,
            max_new_tokens=61,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        sizes[every] = cache.report().kept_share
    assert sizes[None] > 0.6
    assert sizes[1] == pytest.approx(0.25, abs=0.02)
    assert 0.25 - 0.02 < sizes[8] < 0.25 + 0.05


@torch.no_grad()
def test_budgets_of_rows_go_with_them_when_they_change_places():
    model, rows = deep(), rows_of(9, [40, 16])
    held = []
    for index in (None, 1, 0):
        cache = compress(model, rows if index is None else [rows[index]], Config(keep=0.3, drop_every=2))
        mask = padded(rows if index is None else [rows[index]])[1]
        if index is None:
            cache.reorder_cache(torch.tensor([1, 0]))
            mask = mask[[1, 0]]
        for token in range(12):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            ids = torch.full((len(mask), 1), 5 + token)
            positions = (mask.cumsum(1) - 1)[:, -1:]
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        held.append([cache.positions(layer) for layer in range(4)])
    together, second, first = held
    assert [[layer[0]] for layer in together] == second
    assert [[layer[1]] for layer in together] == first


# ---------------------------------------------------------------------- profiles


def test_a_profile_takes_the_mean_of_its_samples_and_survives_a_file(tmp_path):
    model, samples = deep(), rows_of(10, [30, 44, 36])
    profile = calibrate(model, samples, [0.2, 0.5])
    for keep in (0.2, 0.5):
        alone = [compress(model, [sample], Config(keep=keep)) for sample in samples]
        shares = [
            [len(cache.positions(layer)[0]) / len(sample) for layer in range(4)]
            for cache, sample in zip(alone, samples, strict=True)
        ]
        np.testing.assert_allclose(profile.shares[keep], np.mean(shares, axis=0))
    profile.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded == profile
    (row,) = rows_of(11, [50])
    cache = compress(model, [row], Config(keep=0.2), profile=loaded)
    sizes = [len(cache.positions(layer)[0]) for layer in range(4)]
    assert sum(sizes) == 40
    np.testing.assert_allclose(sizes, 50 * np.array(profile.shares[0.2]), atol=1.01)


def test_a_profile_of_something_else_is_refused(tmp_path):
    model, samples = deep(), rows_of(10, [30])
    profile = calibrate(model, samples, [0.2])
    others = {
        "another model or other weights": (deep(seed=1), Config(keep=0.2)),
        "for layer 3, the model has 2 layers": (cached(LLAMA), Config(keep=0.2)),
        "keep 0.2 of all, not 0.3": (model, Config(keep=0.3)),
        'with score="normalized", not "observed"': (model, Config(keep=0.2, score="observed")),
    }
    for words, (other, config) in others.items():
        with pytest.raises(stemma.InvalidBatchError, match=words):
            compress(other, samples, config, profile=profile)
    with pytest.raises(stemma.InvalidBatchError, match="are to be compressed, the profile is for"):
        profile.of([0, 2], 0.2)
    for text in ("{}", "[1]", "nope", json.dumps({"model": "x", "score": "observed", "layers": [0], "shares": 3})):
        (tmp_path / "broken.json").write_text(text, encoding="utf-8")
        with pytest.raises(stemma.InvalidDataError, match="no profile"):
            Profile.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="2 numbers for 1 layers"):
        Profile(model="x", score="observed", layers=(0,), shares={0.5: (0.1, 0.2)}, samples=1)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Profile(model="x", score="observed", layers=(0,), shares={0.5: (1.2,)}, samples=1)


def test_a_profile_does_not_depend_on_the_precision_a_model_is_loaded_in(tmp_path):
    model = stemma.enable(tiny_model("llama", **SIZES))
    profile = calibrate(model, rows_of(0, [20]), [0.5])
    model.save_pretrained(tmp_path)
    low = stemma.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    compress(low, rows_of(1, [20]), Config(keep=0.5), profile=profile)


def test_calibration_refuses_what_it_cannot_average():
    model = cached("gpt_oss, window 5, sinks")
    with pytest.raises(stemma.InvalidBatchError, match="shorter than a sliding window"):
        calibrate(model, rows_of(0, [30, 4]), [0.5])
    with pytest.raises(stemma.InvalidBatchError, match="nothing to calibrate on"):
        calibrate(model, [], [0.5])
    with pytest.raises(ValueError, match="shares to keep"):
        calibrate(model, rows_of(0, [30]), [])
    with pytest.raises(ValueError, match="keep must be above 0"):
        calibrate(model, rows_of(0, [30]), [1.5])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "keep must be above 0 and at most 1"),
        ({"keep": 1.01}, "keep must be above 0 and at most 1"),
        ({"keep": float("nan")}, "keep must be above 0 and at most 1"),
        ({"allocation": "ada"}, "allocation must be one of"),
        ({"score": "norm"}, "score must be one of"),
        ({"protect_first": -1}, "protect_first must be at least 0"),
        ({"protect_first": 0, "protect_last": 0}, "at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"drop_every": 0}, "drop_every must be at least 1"),
        ({"score": "recent"}, "compares attention"),
        ({"score": "window", "drop_every": 4}, "needs score="),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)


def test_short_rows_are_refused_before_any_work(monkeypatch):
    model = cached(LLAMA)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a forward ran"))
    with pytest.raises(stemma.InvalidBatchError, match="row 1 has 5 tokens, of which 4 at the beginning and 16"):
        compress(model, rows_of(0, [30, 5]), Config(**{**CONFIGS["SnapKV"], "protect_first": 4, "window": 16}))


def test_attention_that_is_not_finite_is_refused():
    model = decoder(LLAMA)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(stemma.InvalidBatchError, match="must be finite"):
        compress(model, rows_of(0, [12]))
