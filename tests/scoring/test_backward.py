"""``stemma.backward``: one loss, packed, streamed or plain, gives one value and one set of gradients."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stemma
from decoders import cached, decoder, grads_of, keep_double, random_tree, weights_of
from stemma.prefix.parts import partition
from trees import trees


def _sequence_loss(weights, tree):
    """Not additive over tokens: a clipped ratio of whole sequences, as in GSPO; additive over sequences only."""
    place = torch.zeros(tree.num_sequences, tree.num_columns, dtype=torch.float64)
    chosen = np.repeat(np.arange(tree.num_sequences), tree.lengths)[tree.scored]
    place[chosen, tree.column[tree.scored]] = weights[0]
    length = torch.from_numpy(np.bincount(chosen, minlength=tree.num_sequences)).clamp_min(1)

    def loss(scores):
        row = torch.zeros(tree.num_sequences, dtype=torch.float64).index_add(
            0, scores.sequence, scores.logprobs * place[scores.sequence, scores.column]
        )
        extra = 0.1 * scores.entropies.sum() if scores.entropies is not None else 0.0
        return torch.tanh(row / length)[scores.sequence.unique()].sum() + extra

    return loss


@pytest.mark.parametrize("arguments", [{}, {"mode": "shared", "max_tokens": 13}, {"mode": "plain", "max_tokens": 40}])
def test_a_loss_that_is_no_tensor_is_named(arguments):
    with pytest.raises(ValueError, match="must be a scalar tensor, got float: compute it from"):
        stemma.backward(cached("llama, grouped queries"), random_tree(), lambda scores: 1.0, **arguments)


def _run(model, tree, loss, **arguments):
    model.zero_grad()
    value, scores = stemma.backward(model, tree, loss, temperature=0.9, **arguments)
    return float(value), scores, grads_of(model)


def _assert_same(one, other, tolerance=1e-12):
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
    torch.testing.assert_close(one[1].logprobs, other[1].logprobs, rtol=0, atol=tolerance)
    for name, want in other[2].items():
        assert float((one[2][name] - want).norm()) <= tolerance * max(1.0, float(want.norm())), name


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", ["llama, grouped queries", "gemma2, window 5, soft-caps"])
def test_packed_streamed_and_plain_agree(kind, entropy):
    model, tree = cached(kind), random_tree()
    loss = _sequence_loss(weights_of(tree), tree)
    with keep_double():
        plain = _run(model, tree, loss, mode="plain", entropy=entropy)
        assert plain[1].mode == "plain"
        for budget, mode in ((None, "shared"), (1, "streamed"), (13, "streamed"), (31, "streamed")):
            got = _run(model, tree, loss, mode="shared", max_tokens=budget, entropy=entropy)
            assert got[1].mode == mode
            _assert_same(got, plain)
        _assert_same(_run(model, tree, loss, mode="plain", max_tokens=40, entropy=entropy), plain)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("responses", [[[[5, 6], []], [[]]], [[[], []], [[]]]], ids=["some rows", "all rows"])
@pytest.mark.parametrize(("mode", "budget"), [("shared", None), ("shared", 3), ("plain", None), ("plain", 3)])
def test_rows_without_a_scored_token_have_zero_gradients(mode, budget, responses, entropy):
    """Zeros with a graph, as a masked loss has them: zero gradients, not missing ones, and no crash in a part."""
    model, tree = cached("llama, grouped queries"), stemma.PrefixTree.from_groups([[1, 2, 3], [4, 5, 6, 7]], responses)
    full = _run(model, random_tree(), lambda scores: scores.logprobs.sum())[2]
    value, scores, got = _run(model, tree, lambda s: s.logprobs.sum(), mode=mode, max_tokens=budget, entropy=entropy)
    want = _run(model, tree, lambda s: s.logprobs.sum(), mode="plain")
    assert got.keys() == full.keys()
    assert scores.logprobs.shape == (tree.scored.sum(),)
    _assert_same((value, scores, got), want, tolerance=1e-6)
    if not tree.scored.any():
        assert value == 0.0
        assert not any(gradient.any() for gradient in got.values())
    model.zero_grad()
    stemma.score(model, tree, mode=mode, max_tokens=budget).padded().sum().backward()
    assert grads_of(model).keys() == full.keys()


@settings(max_examples=40)
@given(trees, st.integers(1, 20))
def test_streaming_any_tree(tree, budget):
    model = cached("llama, grouped queries")
    loss = _sequence_loss(weights_of(tree), tree)
    with keep_double():
        _assert_same(_run(model, tree, loss, mode="shared", max_tokens=budget), _run(model, tree, loss, mode="shared"))


@given(trees, st.integers(1, 30))
def test_partition_covers_each_token_and_each_sequence_once(tree, budget):
    tokens, sequences = [], []

    def walk(parts):
        for part in parts:
            tokens.extend(range(part.begin, part.end))
            sequences.extend(part.sequences.tolist())
            whole_nodes = np.isin([part.begin], tree.node_start).all()
            assert whole_nodes
            assert part.end - part.begin <= budget or part.below or _single_leaf(tree, part)
            walk(part.below)

    walk(partition(tree, budget))
    assert sorted(tokens) == list(range(tree.unique_tokens))
    assert sorted(sequences) == list(range(tree.num_sequences))


def _single_leaf(tree, part):
    return np.searchsorted(tree.node_start, part.end) - np.searchsorted(tree.node_start, part.begin) == 1


def test_gradients_accumulate_over_two_batches():
    model, first, second = cached("llama, grouped queries"), random_tree(0), random_tree(1)
    with keep_double():
        model.zero_grad()
        for tree in (first, second):
            stemma.backward(model, tree, lambda s: s.logprobs.sum(), mode="shared", max_tokens=20)
        streamed = grads_of(model)
        model.zero_grad()
        sum(stemma.score(model, tree, mode="plain").logprobs.sum() for tree in (first, second)).backward()
    for name, want in grads_of(model).items():
        torch.testing.assert_close(streamed[name], want, rtol=1e-11, atol=1e-11)


def test_frozen_embeddings():
    model, tree = cached("llama, grouped queries"), random_tree()
    loss = _sequence_loss(weights_of(tree), tree)
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(False)
    try:
        with keep_double():
            _assert_same(_run(model, tree, loss, mode="shared", max_tokens=13), _run(model, tree, loss, mode="plain"))
    finally:
        embedding.requires_grad_(True)


def test_a_loss_must_be_a_scalar():
    model, tree = cached("llama, grouped queries"), random_tree()
    for budget in (None, 13):
        with pytest.raises(ValueError, match="scalar"):
            stemma.backward(model, tree, lambda s: s.logprobs, mode="shared", max_tokens=budget)


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


class _Ledger:
    """Bytes of the distinct storages that autograd holds, and their peak."""

    def __init__(self):
        self.alive, self.peak = {}, 0

    def pack(self, tensor):
        saved = _Saved(tensor)
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.alive[key] = (self.alive.get(key, (0, 0))[0] + 1, size)
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        weakref.finalize(saved, self._release, key)
        return saved

    def _release(self, key):
        count, size = self.alive.pop(key)
        if count > 1:
            self.alive[key] = (count - 1, size)


def test_streaming_saves_memory_independent_of_the_number_of_branches():
    """Bytes saved for the backward at any one time, at 8 and at 64 branches."""
    model = cached("llama, grouped queries")
    random = np.random.default_rng(0)
    peaks = {}
    for branches in (8, 64):
        tree = stemma.PrefixTree.from_groups([random.integers(0, 61, 64)], [random.integers(0, 61, (branches, 16))])
        ledger = _Ledger()
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda saved: saved.tensor):
            stemma.backward(model, tree, lambda s: s.logprobs.sum(), max_tokens=64, mode="shared")
        peaks[branches] = ledger.peak
    assert peaks[64] <= 1.1 * peaks[8]


def test_streamed_scores_replay_under_the_callers_autocast():
    model, tree, dtypes = decoder(dtype=torch.float32), random_tree(), []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = stemma.score(model, tree, mode="shared", max_tokens=13)
    forwards = len(dtypes)
    scores.logprobs.sum().backward()
    assert len(dtypes) == 2 * forwards
    assert set(dtypes) == {torch.bfloat16}
