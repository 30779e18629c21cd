"""Moving rotated keys: against complex numbers, and as a group (turns add up, and back again)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma.attention.rotary import reference_rotate, rotate

FREQUENCIES = 10000.0 ** -(torch.arange(3, dtype=torch.float64) / 3)


def keys(heads=2, tokens=4, dim=10, dtype=torch.float64, seed=0):
    return torch.randn(1, heads, tokens, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(
    offset=st.integers(-5000, 5000),
    interleaved=st.booleans(),
    first=st.integers(0, 4),
    pairs=st.integers(0, 3),
    tokens=st.integers(0, 3),
)
def test_against_complex_numbers(offset, interleaved, first, pairs, tokens):
    x = keys(tokens=tokens)
    arguments = {"interleaved": interleaved, "first": first}
    expected = reference_rotate(x, offset, FREQUENCIES[:pairs], **arguments)
    torch.testing.assert_close(rotate(x, offset, FREQUENCIES[:pairs], **arguments), expected, rtol=0, atol=1e-12)


@given(one=st.integers(-3000, 3000), other=st.integers(-3000, 3000), interleaved=st.booleans())
def test_turns_add_up(one, other, interleaved):
    x = keys()
    twice = rotate(rotate(x, one, FREQUENCIES, interleaved=interleaved), other, FREQUENCIES, interleaved=interleaved)
    torch.testing.assert_close(twice, rotate(x, one + other, FREQUENCIES, interleaved=interleaved), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_offset_for_each_token(interleaved):
    x, offsets = keys(), torch.tensor([3, -7, 0, 900])
    got = rotate(x, offsets, FREQUENCIES, interleaved=interleaved, first=2)
    torch.testing.assert_close(got, reference_rotate(x, offsets, FREQUENCIES, interleaved=interleaved, first=2))
    assert torch.equal(got[:, :, 2], x[:, :, 2])


def test_scores_depend_on_distance_only():
    query, key = keys(tokens=1, seed=1), keys(tokens=1, seed=2)
    turned = [rotate(x, 17, FREQUENCIES, interleaved=False) for x in (query, key)]
    torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (query * key).sum(-1))


def test_pairings_differ_and_the_input_stays():
    x = keys()
    before = x.clone()
    half, interleaved = (rotate(x, 5, FREQUENCIES, interleaved=kind) for kind in (False, True))
    assert (half - interleaved).abs().max() > 0.1
    assert torch.equal(x, before)
    assert torch.equal(half[..., 6:], x[..., 6:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_keeps_its_type_and_far_angles(dtype, tolerance):
    x = keys(dtype=dtype)
    moved = rotate(x, 100_003, FREQUENCIES.float(), interleaved=False)
    assert moved.dtype == dtype
    exact = reference_rotate(x.double(), 100_003, FREQUENCIES.float().double(), interleaved=False)
    torch.testing.assert_close(moved.double(), exact, rtol=0, atol=tolerance)


def test_channels_that_a_head_does_not_have():
    with pytest.raises(ValueError, match="channels 5 to 11 are not in heads of 10"):
        rotate(keys(), 1, FREQUENCIES, interleaved=False, first=5)
