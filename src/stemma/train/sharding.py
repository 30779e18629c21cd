"""Parameters, gradients and optimiser state divided over processes: FSDP2, as `accelerate launch` configures it.

Each transformer layer is a unit, and what is left of the model another one; a unit's parameters are gathered for its
forward and its backward. Gradients come out as sums over processes, as `distributed.sum_gradients` leaves them.

Sampling takes as many forwards as a process's own rows need, which no other process can join in. So parameters are
gathered once before it and let go afterwards: meanwhile every process holds a whole copy of the model, though not of
its gradients and its optimiser state.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stemma.errors import StemmaError

__all__ = [
    "check_plugin",
    "check_sharding",
    "fsdp_plugin",
    "full_model_state_dict",
    "full_optimizer_state_dict",
    "full_tensor",
    "is_sharded",
    "load_full_model_state_dict",
    "load_full_optimizer_state_dict",
    "shard",
    "whole_parameters",
]

_ALL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fsdp_plugin(accelerator: Any) -> Any:
    """accelerate's `FullyShardedDataParallelPlugin`, where `accelerate launch` was asked for FSDP; else None.

    On the CPU, accelerate passes over the request; it is heard here.
    """
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        return accelerator.state.fsdp_plugin
    if kind == "NO" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return isinstance(model, FSDPModule)


def check_plugin(plugin: Any) -> None:
    """Refuse settings of accelerate's `FullyShardedDataParallelPlugin` that `shard` does not follow.

    Raises:
        StemmaError: FSDP1, or one of FSDP2's settings for loading, offloading and activation checkpointing.
    """
    if plugin.fsdp_version != 2:
        raise StemmaError(f"fsdp_version must be 2, got {plugin.fsdp_version}; see examples/accelerate/fsdp2.yaml")
    unwanted = [
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, "every process loads the model itself"),
        ("offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "parameters stay on the device"),
        ("activation_checkpointing", plugin.activation_checkpointing, "the option is --gradient-checkpointing"),
    ]
    for name, is_set, reason in unwanted:
        if is_set:
            raise StemmaError(f"fsdp_{name} must be false in the accelerate configuration: {reason}")


def check_sharding(plugin: Any, model: nn.Module) -> None:
    """Refuse a plugin and a model that `shard` cannot work with.

    Raises:
        StemmaError: see `check_plugin`; or adapters in the model.
    """
    check_plugin(plugin)
    if hasattr(model, "peft_config"):
        raise StemmaError("adapters do not go with FSDP: drop --use-peft, or launch with examples/accelerate/ddp.yaml")


def shard(accelerator: Any, model: nn.Module) -> None:
    """Divide a model's parameters over all processes, in place; they are equal everywhere before.

    Raises:
        StemmaError: see `check_sharding`.
    """
    plugin = fsdp_plugin(accelerator)
    check_sharding(plugin, model)
    names = plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    for unit in _units(model):
        # The loss is a sum already. Gloo has no scaled reductions, so the factor is applied apart (and 1 is none).
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


@contextmanager
def whole_parameters(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Forwards inside need no other process. All processes enter and leave together; no-op for a whole model."""
    units = _units(model)
    reshard = bool(units) and fsdp_plugin(accelerator).reshard_after_forward
    for unit in units:
        unit.unshard()
        if unit is not model:  # the outermost unit keeps its parameters anyway
            unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            if unit is not model:
                unit.set_reshard_after_forward(reshard, recurse=False)
            unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided over processes, which then call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_model_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """The whole parameters of a sharded model on process 0, nothing on others; None for a whole model."""
    return get_model_state_dict(model, options=_ALL) if is_sharded(model) else None


def load_full_model_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load whole parameters, which every process has read."""
    if is_sharded(model):
        set_model_state_dict(model, dict(state), options=_ALL)
    else:
        model.load_state_dict(state)


def full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state; that of a sharded model by parameters' names, on process 0."""
    return get_optimizer_state_dict(model, optimizer, options=_ALL) if is_sharded(model) else optimizer.state_dict()


def load_full_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `full_optimizer_state_dict` gave process 0, which every process has read."""
    if is_sharded(model):
        set_optimizer_state_dict(model, optimizer, dict(state), options=_ALL)
    else:
        optimizer.load_state_dict(dict(state))
