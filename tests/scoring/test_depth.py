"""Thousands of nested prefixes: a trajectory that is scored at each of its turns."""

import numpy as np
import pytest
import torch

import stemma
from stemma.models.tiny import tiny_model
from stemma.prefix.parts import partition, walk

LEVELS = 2000


def nested(branches):
    """Each turn one token; with branches, another sequence leaves after every turn."""
    trajectory = np.random.default_rng(0).integers(0, 61, LEVELS)
    rows = [trajectory[:turn] for turn in range(1, LEVELS + 1)]
    if branches:
        rows += [np.append(trajectory[:turn], (trajectory[turn] + 1) % 61) for turn in range(1, LEVELS - 1)]
    return stemma.PrefixTree.from_sequences(rows, min_shared=1)


@pytest.fixture(scope="module")
def model():
    return stemma.enable(
        tiny_model(
            "llama",
            vocab_size=61,
            hidden_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
            max_position_embeddings=LEVELS,
            dtype=torch.float64,
            seed=0,
        )
    )


@pytest.mark.parametrize(
    ("branches", "max_tokens"),
    [(False, None), (False, 100), (True, None), (True, 3500), pytest.param(True, 100, marks=pytest.mark.slow)],
)
def test_two_thousand_levels(model, branches, max_tokens):
    tree = nested(branches)
    assert tree.depth >= LEVELS - 1
    plan = stemma.explain(model, tree, max_tokens=max_tokens)
    with torch.no_grad():
        scores = stemma.score(model, tree, mode="shared", max_tokens=max_tokens)
        assert scores.mode == ("shared" if max_tokens is None else "streamed") == plan.mode
        for row in (0, 1, 5, 999, LEVELS - 1, *((LEVELS + 1500,) if branches else ())):
            ids = torch.from_numpy(tree.sequence(row))[None]
            alone = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(scores.ragged()[row], alone, rtol=0, atol=1e-5)
    parts = [part for part, enters in walk(partition(tree, 100)) if enters]
    assert np.array_equal(np.sort(np.concatenate([part.sequences for part in parts])), np.arange(tree.num_sequences))
    assert sum(part.end - part.begin for part in parts) == tree.unique_tokens
    if not branches:  # runs of only children are one part
        assert max(part.end - part.begin for part in parts) <= 100
        assert len(parts) == LEVELS // 100
        assert max_tokens is None or plan.parts == len(parts)


def test_gradients_of_a_deep_tree(model):
    tree, found = nested(branches=False), []
    for max_tokens in (None, 100):
        model.zero_grad()
        stemma.backward(model, tree, lambda scores: scores.logprobs.sum(), mode="shared", max_tokens=max_tokens)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        error = float((found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-30))
        assert error < 1e-6, name
