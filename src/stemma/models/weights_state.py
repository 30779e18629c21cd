"""Whether a model of this process is still what it was, without reading its weights."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stemma.models.adapter import base_model

__all__ = ["unsaved_buffers", "weights_state"]

_SAMPLED = 16
"""Values looked at of each tensor."""
_FREQUENCIES = re.compile("(?<!original_)inv_freq$")


@torch.no_grad()
def weights_state(model: nn.Module) -> tuple[object, ...]:
    """What changes when parameters or buffers of a model change; to be compared with ``==`` in the same process.

    Seen are other tensors in their places, another precision, device or memory (``p.data = ...``), every write that
    torch counts (optimizers, ``copy_`` and the like under `no_grad`), and a write past the count (``p.data.mul_(...)``,
    tensors made in inference mode, which have none) if it changes one of 16 values spread over the tensor, the first
    one included. Not seen are other writes past the count, and the rotary frequencies that models with "dynamic" or
    "longrope" scaling set anew in every forward. Which adapters are active is for
    :func:`stemma.models.fingerprint.active_adapters`.

    Takes well under a millisecond for 100 tensors; on an accelerator it waits once for what is under way.
    """
    marks: list[object] = []
    samples: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
    for tensor in _tensors(base_model(model)):
        marks.append((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype))
        try:
            marks.append(tensor.data_ptr())
            if not tensor.is_meta:
                samples.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(_sample(tensor))
        except (RuntimeError, TypeError):  # a tensor of another kind, without memory of its own
            marks.append(None)
    for device, groups in samples.items():
        bits = torch.cat([torch.cat(group).view(torch.uint8) for group in groups.values()])
        marks.append((device, bits.cpu().numpy().tobytes()))
    return tuple(marks)


def unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that no checkpoint has, by name, without rotary frequencies that a forward sets anew."""
    for place, module in base_model(model).named_modules():
        for name, buffer in _buffers(module):
            if name in module._non_persistent_buffers_set:
                yield f"{place}.{name}", buffer


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those that two modules share twice."""
    rest = [model]
    while rest:
        module = rest.pop()
        rest += [below for below in module._modules.values() if below is not None]
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)
        if module._buffers:
            yield from (buffer for _, buffer in _buffers(module))


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kinds: Any = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    sets_frequencies = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
    for name, buffer in module._buffers.items():
        if buffer is not None and not (sets_frequencies and _FREQUENCIES.search(name)):
            yield name, buffer


def _sample(tensor: Tensor) -> Tensor:
    """A few values from one end of its memory to the other, as a view."""
    span = tensor.numel()
    if span and not tensor.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(_SAMPLED, span)
    return tensor.as_strided((count,), ((span - 1) // (count - 1) if count > 1 else 1,))
