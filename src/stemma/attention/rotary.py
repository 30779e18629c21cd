"""Rotary positions of keys that are already rotated: move them by an offset.

Rotary embedding turns each pair of channels `(a, b)` of a key at position `p` by the angle `p * f`, `f` the
pair's frequency (RoFormer, arXiv 2104.09864, equation 34). Turning a stored key by `offset * f` is therefore the same
as encoding it at `p + offset`: turns add up. A factor on cosine and sine, as YaRN has it, is in the stored key
already and must not come in again.
"""

import torch
from torch import Tensor

__all__ = ["reference_rotate", "rotate"]


def rotate(states: Tensor, offset: int | Tensor, frequencies: Tensor, *, interleaved: bool, first: int = 0) -> Tensor:
    """Rotated keys, moved.

    Args:
        states: `(..., T, D)` keys.
        offset: positions to move them by, of either sign; one for all, or `(T,)`.
        frequencies: `(R,)` radians per position of each pair.
        interleaved: pairs are channels `2 i` and `2 i + 1` of the rotated part (GPT-J, GLM, Cohere); otherwise
            channels `i` and `R + i` (Llama, GPT-NeoX).
        first: first channel of the `2 R` rotated ones; the others stay.

    Returns:
        Like `states`; `states` itself is not written.
    """
    last = first + 2 * frequencies.shape[0]
    if not 0 <= first <= last <= states.shape[-1]:
        raise ValueError(f"channels {first} to {last} are not in heads of {states.shape[-1]} channels.")
    positions = torch.as_tensor(offset, dtype=torch.float64, device=states.device)
    angle = positions[..., None] * frequencies.to(states.device, torch.float64)  # thousands of radians: not in float32
    wide = torch.promote_types(states.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    turned = states[..., first:last].to(wide)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    moved = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([states[..., :first], moved.to(states.dtype), states[..., last:]], dim=-1)


def reference_rotate(
    states: Tensor, offset: int | Tensor, frequencies: Tensor, *, interleaved: bool, first: int = 0
) -> Tensor:
    """What `rotate` computes, pair by pair as complex numbers. For tests; same arguments."""
    moved, pairs = states.clone(), frequencies.shape[0]
    for token in range(states.shape[-2]):
        by = float(torch.as_tensor(offset).expand(states.shape[-2])[token])
        for pair in range(pairs):
            a, b = (first + 2 * pair, first + 2 * pair + 1) if interleaved else (first + pair, first + pairs + pair)
            number = torch.complex(states[..., token, a].double(), states[..., token, b].double())
            number = number * torch.polar(torch.ones((), dtype=torch.float64), frequencies[pair].double() * by)
            moved[..., token, a], moved[..., token, b] = number.real.to(states.dtype), number.imag.to(states.dtype)
    return moved
