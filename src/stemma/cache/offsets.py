"""How the keys and values of a text differ below a template from those of the text alone, estimated from anchors.

An anchor is a text whose states are known both alone (the *base*) and below the template. Their difference is added,
weighted by likeness, to the base of another text (arXiv 2510.12872, section 3). With `K_a` the base of anchor
`a`, `K` that of the text (`N` tokens) and `D_a` the anchor's difference,

    s_a(n) = mean over layers, heads, channels of |K_a(n) - K(n)|,  w(n) = softmax_a(-s_a(n) / temperature),
    K'(n) = K(n) + sum_a w_a(n) D_a(n)

for the text, and for the piece of the template behind it one weight per channel, `s_a = |K_a - K|` over the last
`N` tokens; values likewise. The first layer has no difference: its keys and values depend on the token and its
position only. Everything here is in the frame of the base, before keys are moved to where they will stand.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stemma.cache.key_values import KeyValues

__all__ = [
    "Layers",
    "Weighting",
    "add_to_content",
    "add_to_following",
    "closeness",
    "differences",
    "spread",
    "token_weights",
]

Layers = tuple[KeyValues, ...]
"""Keys and values `(1, heads, tokens, dim)` of a run of tokens, layer by layer."""
Weighting = Literal["similarity", "mean"]


def differences(real: Layers, base: Layers) -> Layers:
    """Real minus base of all layers but the first."""
    return tuple(KeyValues(a.key - b.key, a.value - b.value) for a, b in zip(real[1:], base[1:], strict=True))


def token_weights(base: Layers, anchors: Sequence[Layers], temperature: float) -> tuple[Tensor, Tensor]:
    """`(A, N)` weights of anchors for each token of a text, from keys and from values; columns sum to 1.

    Args:
        base: `N` tokens.
        anchors: bases of `A` anchors of at least `N` tokens.
        temperature: above 0.
    """
    tokens = base[0].key.shape[2]
    found = []
    for part in range(2):
        total = torch.zeros(len(anchors), tokens, device=base[0].key.device)
        for layer, pair in enumerate(base):
            apart = torch.stack([anchor[layer][part][0, :, :tokens] for anchor in anchors]) - pair[part]
            total += apart.abs_().sum(dim=(1, 3), dtype=torch.float32)
        channels = sum(pair[part].shape[1] * pair[part].shape[3] for pair in base)
        found.append(torch.softmax(-total / (channels * temperature), dim=0))
    return found[0], found[1]


def add_to_content(
    base: Layers,
    anchors: Sequence[Layers],
    offsets: Sequence[Layers],
    *,
    temperature: float = 1.0,
    weighting: Weighting = "similarity",
) -> Layers:
    """The states of a text as its anchors say they are below the template.

    Args:
        base: `N` tokens alone, `L` layers.
        anchors: bases of `A` anchors, of at least `N` tokens.
        offsets: their differences, `L - 1` layers each; see `differences`.
        temperature: of the weights.
        weighting: by likeness, or all alike.
    """
    tokens, count = base[0].key.shape[2], len(anchors)
    if weighting == "similarity":
        weights = token_weights(base, anchors, temperature)
    else:
        weights = (torch.full((count, 1), 1 / count, device=base[0].key.device),) * 2
    result = [base[0]]
    for layer, pair in enumerate(base[1:]):
        parts = []
        for part, own in enumerate(pair):
            known = torch.stack([offset[layer][part][0, :, :tokens] for offset in offsets])
            weight = weights[part].to(own.dtype)[:, None, :, None]
            parts.append(own + (weight * known).sum(dim=0)[None])
        result.append(KeyValues(*parts))
    return tuple(result)


def add_to_following(
    following: Layers,
    base: Layers,
    anchors: Sequence[Layers],
    offsets: Sequence[Layers],
    *,
    temperature: float = 1.0,
    weighting: Weighting = "similarity",
) -> Layers:
    """The states of the piece of the template behind a text; arguments as for `add_to_content`, with
    `following` the piece's own base and `offsets` its differences."""
    tokens, count = base[0].key.shape[2], len(anchors)
    result = [following[0]]
    for layer, pair in enumerate(following[1:]):
        parts = []
        for part, own in enumerate(pair):
            known = torch.stack([offset[layer][part][0] for offset in offsets])
            if weighting == "similarity":
                text = base[layer + 1][part][0]
                behind = torch.stack([a[layer + 1][part][0, :, -tokens:] for a in anchors])
                distance = (behind - text).float().square_().sum(dim=2, keepdim=True).sqrt_()  # (A, heads, 1, dim)
                weight = torch.softmax(-distance / temperature, dim=0).to(own.dtype)
            else:
                weight = own.new_full((count, 1, 1, 1), 1 / count)
            parts.append(own + (weight * known).sum(dim=0)[None])
        result.append(KeyValues(*parts))
    return tuple(result)


def closeness(base: Layers, anchors: Sequence[Layers], sharpness: float | None) -> Tensor:
    """`(A,)` how near each anchor is, as a distribution: `softmax(-d)`.

    Args:
        base: `N` tokens.
        anchors: of at least `N` tokens.
        sharpness: `d` is this number times `|V_a - V| / |V|`; None for the published `d = |V_a - V|` (Frobenius
            norms over all layers, heads, tokens and channels), which grows with the number of all those, so that the
            softmax is 0 and 1 for texts of ordinary length.
    """
    tokens = base[0].key.shape[2]
    squares = torch.zeros(len(anchors), device=base[0].value.device)
    norm = torch.zeros((), device=base[0].value.device)
    for layer, pair in enumerate(base):
        apart = torch.stack([anchor[layer].value[0, :, :tokens] for anchor in anchors]) - pair.value
        squares += apart.float().square_().sum(dim=(1, 2, 3))
        norm += pair.value.float().square().sum()
    distance = squares.sqrt()
    if sharpness is not None:
        distance = sharpness * distance / norm.sqrt().clamp_min(1e-30)
    return torch.softmax(-distance, dim=0)


def spread(closeness_A: Tensor) -> float:
    """Entropy of a distribution over its largest value `log2 A`: 0 where one anchor is near, 1 where all are
    alike."""
    if closeness_A.numel() < 2:
        return 0.0
    entropy = -(closeness_A * closeness_A.clamp_min(1e-30).log2()).sum()
    return float(entropy) / math.log2(closeness_A.numel())
