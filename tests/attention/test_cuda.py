"""The CUDA backends against one dense mask in float64. Skipped without a GPU."""

import numpy as np
import pytest
import torch

from stemma.attention import reference_tree_attention, tree_attention
from stemma.prefix.layout import Layout
from stemma.prefix.tree import PrefixTree

pytestmark = pytest.mark.gpu


def _layout():
    random = np.random.default_rng(0)
    stem = random.integers(0, 99, 130)
    prompts = [np.concatenate([stem, random.integers(0, 99, n)]) for n in (70, 300)] + [random.integers(0, 99, 65)]
    responses = [[random.integers(0, 99, n) for n in (1, 63, 100, 257)] for _ in prompts]
    return Layout.of(PrefixTree.from_groups(prompts, responses))


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", ["blocks", "varlen", "flex"])
def test_output_and_gradients(backend, sinks, window, heads):
    layout, dtype = _layout(), torch.float32 if backend == "blocks" else torch.bfloat16
    generator = torch.Generator(device="cuda").manual_seed(0)
    tokens = layout.num_tokens
    sizes = [(1, heads[0], tokens, 64), (1, heads[1], tokens, 64), (1, heads[1], tokens, 64)]
    inputs = [torch.randn(size, device="cuda", generator=generator).to(dtype).requires_grad_() for size in sizes]
    sink = torch.randn(heads[0], device="cuda", generator=generator).requires_grad_() if sinks else None
    inputs += [sink] if sinks else []
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = tree_attention(*inputs[:3], layout, window=window, sinks=sink, backend=backend)
    want = reference_tree_attention(*wide[:3], layout, window=window, sinks=wide[3] if sinks else None)
    grad = torch.randn(want.shape, device="cuda", generator=generator, dtype=torch.float64)
    pairs = [
        (got, want),
        *zip(torch.autograd.grad(got, inputs, grad.to(got.dtype)), torch.autograd.grad(want, wide, grad), strict=True),
    ]
    for mine, truth in pairs:
        error = float((mine.double() - truth).norm() / truth.norm())
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_half_precision_takes_variable_length_calls_by_itself(monkeypatch):
    import stemma.attention.varlen as varlen

    calls = []
    kept = varlen.varlen_forward
    monkeypatch.setattr(varlen, "varlen_forward", lambda *a, **k: calls.append(1) or kept(*a, **k))
    layout = _layout()
    query = torch.randn(1, 4, layout.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    tree_attention(query, query, query, layout)
    assert calls
