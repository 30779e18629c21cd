"""Anchors: estimates against loops over single numbers, the sharing rule at its bounds, eviction, threads, files."""

import json
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stemma.cache.anchors import AnchorPool, Deviation
from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import (
    add_to_content,
    add_to_following,
    closeness,
    differences,
    spread,
    token_weights,
)
from stemma.errors import InvalidBatchError, InvalidDataError

SHAPES = ((2, 4), (1, 6), (2, 3))  # heads and channels of each layer


def layers(tokens, seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, dim):
        return torch.randn(1, heads, tokens, dim, dtype=torch.float64, generator=generator)

    return tuple(KeyValues(draw(heads, dim), draw(heads, dim + 1)) for heads, dim in shapes)


def deviation(tokens, seed, following=3):
    return Deviation(layers(tokens, seed, SHAPES[1:]), layers(following, seed + 1, SHAPES[1:]))


def flat(some):
    return [tensor for pair in some for tensor in pair]


def close(some, others, atol=1e-12):
    for x, y in zip(flat(some), flat(others), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def softmax(scores):
    total = sum(math.exp(s - max(scores)) for s in scores)
    return [math.exp(s - max(scores)) / total for s in scores]


def reference_content(base, anchors, offsets, temperature):
    """Number by number."""
    tokens = base[0].key.shape[2]
    result = [KeyValues(pair.key.clone(), pair.value.clone()) for pair in base]
    for part in range(2):
        for n in range(tokens):
            scores = []
            for anchor in anchors:
                apart = [
                    abs(float(a - b))
                    for pair, own in zip(anchor, base, strict=True)
                    for a, b in zip(pair[part][0, :, n].flatten(), own[part][0, :, n].flatten(), strict=True)
                ]
                scores.append(-sum(apart) / len(apart) / temperature)
            for layer in range(1, len(base)):
                for weight, offset in zip(softmax(scores), offsets, strict=True):
                    result[layer][part][0, :, n] += weight * offset[layer - 1][part][0, :, n]
    return tuple(result)


def reference_following(following, base, anchors, offsets, temperature):
    tokens = base[0].key.shape[2]
    result = [KeyValues(pair.key.clone(), pair.value.clone()) for pair in following]
    for layer in range(1, len(base)):
        for part in range(2):
            own = base[layer][part][0]
            for head in range(own.shape[0]):
                for channel in range(own.shape[2]):
                    scores = []
                    for anchor in anchors:
                        behind = anchor[layer][part][0, head, -tokens:, channel]
                        scores.append(-float((behind - own[head, :, channel]).norm()) / temperature)
                    for weight, offset in zip(softmax(scores), offsets, strict=True):
                        result[layer][part][0, head, :, channel] += (
                            weight * offset[layer - 1][part][0, head, :, channel]
                        )
    return tuple(result)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 4),
    longer=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    temperature=st.sampled_from([0.05, 1.0, 7.0]),
)
def test_estimates_against_loops(tokens, longer, temperature):
    base, piece = layers(tokens, 0), layers(3, 99)
    anchors = [layers(tokens + more, 10 + i) for i, more in enumerate(longer)]
    known = [deviation(tokens + more, 50 + 2 * i) for i, more in enumerate(longer)]
    offsets = [d.content for d in known]
    got = add_to_content(base, anchors, offsets, temperature=temperature)
    close(got, reference_content(base, anchors, offsets, temperature), atol=1e-5)  # weights are float32
    offsets = [d.following for d in known]
    got = add_to_following(piece, base, anchors, offsets, temperature=temperature)
    close(got, reference_following(piece, base, anchors, offsets, temperature), atol=1e-5)


@given(count=st.integers(1, 4), temperature=st.floats(0.01, 10))
def test_weights_sum_to_one_and_prefer_the_nearest(count, temperature):
    base = layers(3, 0)
    anchors = [tuple(KeyValues(k + i, v + i) for k, v in base) for i in range(count)]
    for weights in token_weights(base, anchors, temperature):
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(3))
        assert (weights.argmax(dim=0) == 0).all()


def test_the_mean_ignores_likeness():
    base, piece = layers(3, 0), layers(2, 7)
    anchors, known = [layers(3, 1), layers(5, 2)], [deviation(3, 3, 2), deviation(5, 5, 2)]
    offsets = [d.content for d in known]
    got = add_to_content(base, anchors, offsets, weighting="mean")
    expected = base[2].key + (offsets[0][1].key + offsets[1][1].key[:, :, :3]) / 2
    torch.testing.assert_close(got[2].key, expected)
    offsets = [d.following for d in known]
    got = add_to_following(piece, base, anchors, offsets, weighting="mean")
    torch.testing.assert_close(got[1].value, piece[1].value + (offsets[0][0].value + offsets[1][0].value) / 2)


def test_an_anchor_that_is_the_text_gives_its_real_states():
    base, real = layers(4, 0), layers(4, 1)
    real = (base[0], *real[1:])
    close(add_to_content(base, [base], [differences(real, base)]), real, atol=1e-14)


def test_first_layer_is_left_alone():
    base, piece = layers(3, 0), layers(3, 7)
    known = deviation(3, 3)
    assert torch.equal(add_to_content(base, [layers(3, 1)], [known.content])[0].key, base[0].key)
    assert torch.equal(add_to_following(piece, base, [layers(3, 1)], [known.following])[0].value, piece[0].value)


# ---------------------------------------------------------------------- sharing rule


@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_distances_spread_fully_and_one_near_anchor_not_at_all(count):
    base = layers(3, 0)
    alike = [tuple(KeyValues(k + 1, v + 1) for k, v in base)] * count
    assert spread(closeness(base, alike, None)) == pytest.approx(1, abs=1e-6)
    assert spread(closeness(base, [base, *alike[1:]], 1000.0)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.ones(1)) == 0


def test_published_distances_saturate_with_the_length_and_relative_ones_do_not():
    """The same likeness, in texts of 4 and of 400 tokens: one anchor is 3% nearer than the others."""

    def rule(tokens, sharpness):
        base = layers(tokens, 0)
        other = layers(tokens, 1)
        anchors = [
            tuple(KeyValues(k, v + near * o.value) for (k, v), o in zip(base, other, strict=True))
            for near in (0.97, 1, 1)
        ]
        return spread(closeness(base, anchors, sharpness))

    assert rule(4, None) > 0.9
    assert rule(400, None) < 0.7
    assert rule(4, 30.0) == pytest.approx(rule(400, 30.0), abs=0.1)


# ---------------------------------------------------------------------- pool


def filled(pool, numbers, placeholder="question", tokens=4):
    for number in numbers:
        pool.learn(placeholder, [number] * tokens, "alone", layers(tokens, number), "a", deviation(tokens, number))
    return pool


def names(pool, placeholder="question"):
    return [anchor.ids[0] for anchor in pool.anchors(placeholder)]


def test_the_least_used_of_the_five_oldest_goes_and_never_the_new_one():
    pool = filled(AnchorPool(max_anchors=7), range(7))
    for number in (0, 0, 1, 2, 3, 4):
        pool.credit([pool.anchors("question")[number]], torch.ones(1), 0.9)
    filled(pool, [7])  # of the oldest five 1 is used least and oldest; 5 and 6 are used less, but younger
    assert names(pool) == [0, 2, 3, 4, 5, 6, 7]
    filled(pool, [8])  # now 5 is one of the five
    assert names(pool) == [0, 2, 3, 4, 6, 7, 8]
    assert pool.evictions == 2
    assert len(pool) == pool.max_anchors
    filled(pool, [9], placeholder="other")  # each placeholder has its own limit
    assert len(pool) == 8


def test_a_new_anchor_stays_though_all_others_are_used():
    pool = filled(AnchorPool(max_anchors=2), [0, 1])
    pool.credit(pool.anchors("question"), torch.full((2,), 0.5), 1.0)
    assert names(filled(pool, [2])) == [1, 2]


def test_bytes_are_bounded_over_all_placeholders():
    one = filled(AnchorPool(), [0]).nbytes
    assert one == sum(t.nbytes for t in flat(layers(4, 0)) + flat(deviation(4, 0).content + deviation(4, 0).following))
    pool = AnchorPool(max_bytes=3 * one)
    filled(filled(pool, [0, 1]), [2, 3], placeholder="other")
    assert (names(pool), names(pool, "other")) == ([1], [2, 3])
    assert pool.nbytes == 3 * one
    kept = pool.learn("question", [9] * 40, "alone", layers(40, 9), "a", deviation(40, 9))
    assert not kept
    assert pool.nbytes <= pool.max_bytes


def test_another_agent_adds_to_the_same_anchor():
    pool = filled(AnchorPool(), [0, 1])
    pool.learn("question", [1] * 4, "alone", layers(4, 1), "b", deviation(4, 8))
    assert names(pool) == [0, 1]
    assert [match.anchor.ids[0] for match in pool.matches(pool.anchors("question"), "b")] == [1]
    assert len(pool.matches(pool.anchors("question"), "a")) == 2
    torch.testing.assert_close(
        pool.matches(pool.anchors("question"), "b")[0].deviation.content[0].key, deviation(4, 8).content[0].key
    )


def test_shorter_anchors_and_those_of_another_origin_are_not_eligible():
    pool = filled(AnchorPool(), [0])
    filled(pool, [1], tokens=6)
    assert [a.ids[0] for a in pool.eligible("question", 5, "alone")] == [1]
    assert pool.eligible("question", 7, "alone") == ()
    assert pool.eligible("question", 4, "generated") == ()
    assert pool.find("question", [0] * 4, "generated") is None
    assert pool.find("question", [0] * 4, "alone") is pool.anchors("question")[0]


@pytest.mark.parametrize(("top_p", "uses"), [(0.5, [1, 0, 0]), (0.9, [1, 0, 1]), (0.0, [1, 0, 0]), (1.0, [1, 1, 1])])
def test_uses_are_counted_until_top_p(top_p, uses):
    pool = filled(AnchorPool(), range(3))
    pool.credit(pool.anchors("question"), torch.tensor([0.6, 0.05, 0.35]), top_p)
    assert [anchor.uses for anchor in pool.anchors("question")] == uses


def test_what_a_pool_holds_is_its_own():
    mine = layers(4, 0)
    pool = AnchorPool()
    pool.learn("question", [1], "alone", mine, "a", deviation(4, 1))
    before = mine[0].key.clone()
    mine[0].key.zero_()
    assert torch.equal(pool.anchors("question")[0].base[0].key, before)


def test_limits_are_checked():
    for options in ({"max_anchors": 0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            AnchorPool(**options)


def test_threads_share_a_pool():
    pool, errors = AnchorPool(max_anchors=5), []

    def work(seed):
        try:
            for step in range(30):
                number = (seed * 7 + step) % 11
                filled(pool, [number])
                anchors = pool.anchors("question")
                assert len(anchors) <= 5
                pool.credit(anchors, torch.full((len(anchors),), 1 / len(anchors)), 0.5)
                pool.matches(anchors, "a")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(pool) == 5
    assert len({anchor.number for anchor in pool.anchors("question")}) == 5


# ---------------------------------------------------------------------- whose, and files


def test_another_model_and_another_template_are_refused():
    pool = AnchorPool()
    pool.bind({"model": "x", "dtype": "float32"})
    pool.bind({"model": "x", "dtype": "float32"})
    with pytest.raises(InvalidBatchError, match=r"another dtype .'float32', now 'bfloat16'"):
        pool.bind({"model": "x", "dtype": "bfloat16"})
    pool.register("a", "one")
    pool.register("a", "one")
    with pytest.raises(InvalidBatchError, match="agent 'a' with another template"):
        pool.register("a", "two")


def test_save_and_load_are_bit_equal(tmp_path):
    pool = filled(filled(AnchorPool(max_anchors=4, max_bytes=10**6), [3, 1]), [2], placeholder="other", tokens=6)
    pool.learn("question", [1] * 4, "alone", layers(4, 1), "b", Deviation(deviation(4, 8).content, None))
    pool.bind({"model": "x"})
    pool.register("a", "one")
    pool.credit(pool.anchors("question"), torch.tensor([0.9, 0.1]), 0.5)
    path = tmp_path / "pool.safetensors"
    pool.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    found = AnchorPool.load(path)
    assert (found.max_anchors, found.max_bytes, found.nbytes) == (4, 10**6, pool.nbytes)
    for placeholder in ("question", "other"):
        for mine, its in zip(pool.anchors(placeholder), found.anchors(placeholder), strict=True):
            assert (mine.ids, mine.origin, mine.number, mine.uses) == (its.ids, its.origin, its.number, its.uses)
            close(mine.base, its.base, atol=0)
            assert mine.deviations.keys() == its.deviations.keys()
            for agent, known in mine.deviations.items():
                close(known.content, its.deviations[agent].content, atol=0)
                assert (known.following is None) == (its.deviations[agent].following is None)
                close(known.following or (), its.deviations[agent].following or (), atol=0)
    with pytest.raises(InvalidBatchError, match="another model"):
        found.bind({"model": "y"})
    with pytest.raises(InvalidBatchError, match="another template"):
        found.register("a", "two")
    filled(found, [8])
    assert found.anchors("question")[-1].number == 3  # goes on counting


def test_files_that_are_no_pool(tmp_path):
    path = tmp_path / "pool.safetensors"
    with pytest.raises(InvalidDataError, match="holds no anchors"):
        AnchorPool.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(InvalidDataError, match="SafetensorError"):
        AnchorPool.load(path)
    save_file({}, path, metadata={"stemma_anchors": json.dumps({"format": 99})})
    with pytest.raises(InvalidDataError, match="format 99, expected 1"):
        AnchorPool.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InvalidDataError, match="stemma_anchors"):
        AnchorPool.load(path)
