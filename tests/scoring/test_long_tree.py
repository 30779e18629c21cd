"""A tree of 64k tokens runs forward and backward without a tensor that grows with tokens squared."""

import numpy as np
import pytest
import torch

import stemma
from allocations import Largest
from stemma.models.tiny import tiny_model


@pytest.mark.slow
def test_64k_tokens():
    random = np.random.default_rng(0)
    model = stemma.enable(
        tiny_model(
            "llama",
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=65536,
        )
    )
    tree = stemma.PrefixTree.from_groups([random.integers(0, 64, 32768)], [random.integers(0, 64, (16, 2048))])
    assert tree.unique_tokens == 65536
    with Largest() as largest:
        loss, _ = stemma.backward(model, tree, lambda scores: scores.logprobs.sum(), mode="shared")
    assert torch.isfinite(loss)
    # The widest thing a token has is its feed-forward row or its row of logits (64 each).
    assert largest.elements <= 64 * tree.unique_tokens
