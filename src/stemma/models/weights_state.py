"""Whether a model of this process is still what it was, without reading its weights."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stemma.models.adapter import base_model

__all__ = ["unsaved_buffers", "weights_state"]

_FREQUENCIES = re.compile("(?<!original_)inv_freq$")


def weights_state(model: nn.Module) -> tuple[object, ...]:
    """What changes when parameters or buffers of a model change; to be compared with `==` in the same process.

    Seen are other tensors in their places, another precision, device or memory (`p.data = ...`), and every write that
    torch counts (optimizers, `copy_` and the like under `no_grad`), as autograd sees them. Not seen are writes past
    the count (`p.data.mul_(...)`, and into tensors made in inference mode, which have none), and the rotary
    frequencies that models with "dynamic" or "longrope" scaling set anew in every forward, and offloaded weights. Which
    adapters are active is for `stemma.models.fingerprint.active_adapters`.
    """
    marks: list[object] = []
    for tensor in _tensors(base_model(model)):
        marks.append((id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype))
        try:
            marks.append(tensor.data_ptr())
        except (RuntimeError, TypeError):  # a tensor of another kind, without memory of its own
            marks.append(None)
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
        if getattr(module.__dict__.get("_hf_hook"), "offload", False):
            continue  # of accelerate: the weights come anew for each forward
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
