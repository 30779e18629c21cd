"""What several processes have to agree on, through an `accelerate.Accelerator`; no-ops with a single process.

Here processes hold whole copies of the model; for parameters divided over processes (FSDP2) see `sharding`. Gradients
are summed once per optimiser step, explicitly, instead of through DistributedDataParallel: scoring a prefix tree calls
the decoder and the head separately and streams a large tree through several backward calls, which DDP's hooks do not
expect.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stemma.errors import StemmaError
from stemma.train.sharding import check_plugin, fsdp_plugin

__all__ = [
    "any_process",
    "broadcast_parameters",
    "check_accelerator",
    "max_over_processes",
    "sum_gradients",
    "sum_over_processes",
]

_BUCKET_ELEMENTS = 32 * 1024 * 1024


def check_accelerator(accelerator: Any, *, bf16: bool) -> None:
    """Refuse what the configuration of `accelerate launch` asks for and the trainers would not do.

    Args:
        bf16: whether forwards run under bfloat16 autocast.

    Raises:
        StemmaError: a model spread over processes otherwise than by FSDP2 as `check_plugin` wants it, or mixed
            precision other than the trainer's own.
    """
    kind = accelerator.distributed_type.value
    plugin = fsdp_plugin(accelerator)
    if plugin is not None:
        check_plugin(plugin)
    elif kind != "NO" and not kind.startswith("MULTI_"):
        raise StemmaError(
            f"distributed_type {kind} spreads the model over processes in a way that the trainers do not know; use "
            "MULTI_GPU (examples/accelerate/ddp.yaml) or FSDP (examples/accelerate/fsdp2.yaml)"
        )
    if accelerator.mixed_precision not in ("no", "bf16" if bf16 else "no"):
        raise StemmaError(
            f"mixed_precision {accelerator.mixed_precision} of the accelerate configuration has no effect here; set it "
            "to no, and give --bf16 for bfloat16"
        )


def sum_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over processes, in buckets; a missing gradient counts as zero."""
    if accelerator.num_processes == 1:
        return
    bucket: list[nn.Parameter] = []
    for parameter in (*(p for p in parameters if p.requires_grad), None):
        full = sum(p.numel() for p in bucket) >= _BUCKET_ELEMENTS
        changes = parameter is not None and bool(bucket) and parameter.dtype != bucket[0].dtype
        if bucket and (parameter is None or full or changes):
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
            parts = accelerator.reduce(flat, reduction="sum").split([p.numel() for p in bucket])
            for member, part in zip(bucket, parts, strict=True):
                member.grad = part.view_as(member).clone()
            bucket = []
        if parameter is not None:
            bucket.append(parameter)


def broadcast_parameters(accelerator: Any, model: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0."""
    if accelerator.num_processes > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)


def sum_over_processes(accelerator: Any, values: Sequence[float]) -> list[float]:
    """Each number summed over processes."""
    if accelerator.num_processes == 1:
        return list(values)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = accelerator.reduce(torch.tensor(values, dtype=dtype, device=accelerator.device), reduction="sum")
    return total.tolist()


def any_process(accelerator: Any, flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(sum_over_processes(accelerator, [float(flag)])[0])


def max_over_processes(accelerator: Any, value: float) -> float:
    """The largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).max().item()
