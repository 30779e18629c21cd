"""Tree attention against one dense mask: output and every gradient, over trees, windows, sinks, soft-caps, heads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stemma.attention.varlen as varlen
from allocations import Largest
from stemma.attention import reference_tree_attention, tree_attention
from stemma.attention.kernels import block_backward, block_forward
from stemma.prefix.layout import Layout
from stemma.prefix.tree import PrefixTree
from trees import layouts

HEADS = st.sampled_from([(4, 1), (4, 2), (2, 2)])
WINDOWS = st.sampled_from([None, 1, 2, 3, 7, 100])


def _inputs(layout, heads, dims=(8, 8), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = layout.context + layout.num_tokens
    # queries as a model makes them: tokens before heads in memory
    query = torch.randn(1, layout.num_tokens, heads[0], dims[0], dtype=torch.float64, generator=generator).transpose(
        1, 2
    )
    key = torch.randn(1, heads[1], keys, dims[0], dtype=torch.float64, generator=generator)
    value = torch.randn(1, heads[1], keys, dims[1], dtype=torch.float64, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (query, key, value)]


def _compare(layout, inputs, atol=1e-12, backend=None, **settings):
    got = tree_attention(*inputs[:3], layout, backend=backend, **settings)
    want = reference_tree_attention(*inputs[:3], layout, **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    grad = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    names = ["query", "key", "value", "sinks"]
    for name, a, b in zip(
        names, torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=False
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"gradient of {name}: {m}")


@given(
    layouts(), HEADS, WINDOWS, st.sampled_from([None, 2.0]), st.booleans(), st.sampled_from([(8, 8), (8, 4), (4, 8)])
)
def test_equals_a_dense_mask(layout, heads, window, softcap, with_sinks, dims):
    inputs = _inputs(layout, heads, dims)
    sinks = torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_() if with_sinks else None
    settings = {"window": window, "softcap": softcap, "sinks": sinks, "scale": 0.3}
    _compare(layout, inputs + ([sinks] if with_sinks else []), **settings)


@given(layouts(), HEADS, WINDOWS, st.booleans())
def test_variable_length_calls_equal_a_dense_mask(layout, heads, window, with_sinks):
    """The CUDA schedule, with a kernel that loops over its segments."""
    inputs = _inputs(layout, heads)
    sinks = torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_() if with_sinks else None
    kept = varlen.flash_kernel
    varlen.flash_kernel = varlen.reference_kernel
    try:
        _compare(layout, inputs + ([sinks] if with_sinks else []), backend="varlen", window=window, sinks=sinks)
    finally:
        varlen.flash_kernel = kept


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("window", [None, 40, 150])
def test_long_nodes_of_real_head_sizes(head_dim, window):
    """Nodes beyond the batched length, lengths that are no multiple of a kernel's block."""
    random = np.random.default_rng(0)
    tree = PrefixTree.from_groups([random.integers(0, 99, 301)], [[random.integers(0, 99, n) for n in (63, 100, 257)]])
    layout = Layout.of(tree)
    _compare(layout, _inputs(layout, (2, 1), (head_dim, head_dim)), atol=1e-11, window=window)


def test_gradcheck():
    tree = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 5], [1, 2], [7]], min_shared=1)
    layout = Layout.of(tree)
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for window in (None, 2):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, w=window: tree_attention(q, k, v, layout, window=w, sinks=s),
            (*_inputs(layout, (2, 1), (3, 3)), sinks),
        )


def test_double_backward_is_refused():
    layout = Layout.of(PrefixTree.from_sequences([[1, 2]]))
    query, key, value = _inputs(layout, (1, 1))
    output = tree_attention(query, key, value, layout)
    (grad,) = torch.autograd.grad((output * output).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_plain_math_equals_the_fused_kernel(softcap, monkeypatch):
    monkeypatch.setattr("stemma.attention.kernels._SLICE_ELEMENTS", 50)  # several slices
    layout = Layout.of(PrefixTree.from_sequences([[1, 2, 3, 4, 5, 6]]))
    query, key, value = (x.detach() for x in _inputs(layout, (4, 2)))
    from stemma.attention import kernels

    for causal in (True, False):
        out, lse = kernels._math_forward(query, key, value, causal, 0.3, softcap)
        want = reference_tree_attention(query, key, value, layout, scale=0.3, softcap=softcap) if causal else None
        if want is not None:
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        if softcap is None:
            fused = block_forward(query, key, value, causal=causal, scale=0.3, softcap=None)
            torch.testing.assert_close((out, lse), tuple(fused), rtol=0, atol=1e-12)
            grad = torch.randn_like(out)
            a = kernels._math_backward(grad, query, key, value, out, lse, causal, 0.3, None)
            b = block_backward(grad, query, key, value, out, lse, causal=causal, scale=0.3, softcap=None)
            torch.testing.assert_close(tuple(a), tuple(b), rtol=0, atol=1e-12)


def test_autocast_does_not_reach_into_plain_math():
    layout = Layout.of(PrefixTree.from_groups([[1] * 9, [2] * 5], [[[3] * 4, [4] * 6], [[5] * 3, [6] * 2]]))
    for dtype in (torch.bfloat16, torch.float32):
        inputs = _inputs(layout, (4, 2), dtype=dtype)
        found = []
        for wanted in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=wanted):
                output = tree_attention(*inputs, layout, softcap=2.0)
                found.append([output, *torch.autograd.grad(output, inputs, torch.ones_like(output))])
        for without, within in zip(*found, strict=True):
            assert within.dtype == dtype
            assert torch.equal(within, without)


@pytest.mark.parametrize("settings", [{}, {"window": 5}, {"softcap": 2.0}], ids=str)
def test_flex_attention_forward(settings):
    random = np.random.default_rng(0)
    tree = PrefixTree.from_groups([random.integers(0, 9, 12)], [random.integers(0, 9, (3, 6))])
    for layout in (Layout.of(tree), Layout.of(tree, 12, tree.unique_tokens)):
        inputs = [x.detach() for x in _inputs(layout, (4, 2), dtype=torch.float32)]
        sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
        got = tree_attention(*inputs, layout, backend="flex", sinks=sinks, **settings)
        torch.testing.assert_close(got, reference_tree_attention(*inputs, layout, sinks=sinks, **settings))


def test_bfloat16_prefix_gradients_do_not_lose_precision_with_the_number_of_branches():
    """Relative error of the prefix's key and value gradients, at 8 and at 128 branches."""
    errors = {}
    for branches in (8, 128):
        random = np.random.default_rng(0)
        tree = PrefixTree.from_groups([random.integers(0, 99, 128)], [random.integers(0, 99, (branches, 16))])
        layout = Layout.of(tree)
        inputs = [x.detach().bfloat16() for x in _inputs(layout, (2, 1), (32, 32))]
        grads = []
        for dtype in (torch.bfloat16, torch.float64):
            q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
            out = tree_attention(q, k, v, layout)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
            grads.append([g[:, :, :128].double() for g in torch.autograd.grad(out, (k, v), grad)])
        low, high = grads
        errors[branches] = max(float((a - b).norm() / b.norm()) for a, b in zip(low, high, strict=True))
    assert errors[128] < 1.1 * errors[8]
    assert errors[8] < 1e-2


@pytest.mark.parametrize("window", [None, 512])
def test_no_tensor_of_tokens_squared(window):
    random = np.random.default_rng(0)
    tree = PrefixTree.from_groups([random.integers(0, 99, 4096)], [random.integers(0, 99, (8, 512))])
    layout = Layout.of(tree)
    inputs = _inputs(layout, (1, 1), (8, 8), dtype=torch.float32)
    with Largest() as largest:
        tree_attention(*inputs, layout, window=window).sum().backward()
    assert largest.elements <= 2 * layout.num_tokens * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": 3}, "expected query"),
        ({"heads": (3, 2)}, "multiple"),
        ({"window": 0}, "window"),
        ({"backend": "magic"}, "backend"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    layout = Layout.of(PrefixTree.from_sequences([[1, 2, 3, 4]]))
    query, key, value = _inputs(layout, change.pop("heads", (2, 1)))
    query = query[:, :, : change.pop("query", 4)]
    with pytest.raises(ValueError, match=message):
        tree_attention(query, key, value, layout, **change)
