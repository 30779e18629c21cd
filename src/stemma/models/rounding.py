"""How far rounding alone moves a model's results: what two ways to compute the same thing are compared with.

No fixed tolerance fits: log-probabilities of a deep model in bfloat16 move by tenths of a nat when products are summed
in another order, those of a small one in float32 by a millionth. So rounding is measured on the model itself, in two
ways. `rounded_anew` rounds the output of every module once more, at random, as in "Monte Carlo Arithmetic"
(Parker, 1997). `in_higher_precision` computes with the same weights in a wider type, where rounding hides little.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["higher_precision", "in_higher_precision", "is_materialised", "rounded_anew", "rounding_margin"]

_HIGHER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

_CPU_BYTES = 4 << 30
"""Most memory that weights in a higher precision may take on a CPU; elsewhere half of what is free."""


def _rounding_unit(dtype: torch.dtype, device: torch.device) -> float:
    """Relative size of one rounding error in `dtype`.

    Models in float64 keep float32 in their norms and softmaxes, and products of float32 are allowed fewer bits by
    `torch.set_float32_matmul_precision`.
    """
    unit = torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        unit = torch.finfo(torch.float32).eps
    if dtype == torch.float32:
        allowed = torch.get_float32_matmul_precision()
        if device.type == "cuda" and allowed != "highest":
            unit = 2.0**-10
        elif device.type == "cpu" and allowed == "medium":
            unit = torch.finfo(torch.bfloat16).eps
    return unit


def rounding_margin(dtype: torch.dtype) -> float:
    """How many times its own rounding a model that computes in `dtype` may be off. Products of half precision are
    summed in float32 and rounded once; those of float32 gather an error at each step of the sum."""
    return 3.0 if dtype in (torch.float16, torch.bfloat16) else 8.0


@contextmanager
def rounded_anew(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Round the output of every module without children once more, by up to one unit in either direction at random.

    What changes in the result is the size of the model's own rounding errors. Not for threads that share the model.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def round_again(module: nn.Module, arguments: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.dtype not in (*_HIGHER, torch.float64):
            return None
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        noise = torch.empty_like(output, requires_grad=False).uniform_(-1, 1, generator=generators[device])
        return torch.addcmul(output, output, noise, value=_rounding_unit(output.dtype, device))

    handles = [
        module.register_forward_hook(round_again) for module in model.modules() if next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_materialised(model: nn.Module) -> bool:
    """Whether all weights lie in this process: none on the meta device (also where offloaded), none sharded."""
    return not any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters())


def higher_precision(model: nn.Module) -> torch.dtype | None:
    """A wider type in which the model can be computed with for a moment: float32 for bfloat16 and float16, float64 for
    float32. None where there is none, where weights are quantised, offloaded or sharded, or the memory is not there."""
    parameters = list(model.parameters())
    kinds = {p.dtype for p in parameters}
    if not kinds or not kinds <= _HIGHER.keys() or not is_materialised(model):
        return None
    if any(type(p.data) is not Tensor for p in parameters):
        return None
    wide = min((_HIGHER[kind] for kind in kinds), key=lambda kind: kind.itemsize)
    free = {
        device: torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CPU_BYTES
        for device in {p.device for p in parameters}
    }
    for parameter in parameters:
        free[parameter.device] -= parameter.numel() * wide.itemsize if parameter.dtype != wide else 0
    return wide if min(free.values()) >= 0 else None


@contextmanager
def in_higher_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let weights and floating-point buffers be copies in `dtype`; the same memory comes back.

    Not for threads that share the model.
    """
    kept = [(x, x.data) for x in chain(model.parameters(), model.buffers()) if x.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
