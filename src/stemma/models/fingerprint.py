"""What the keys and values of given tokens depend on, as digests: to refuse states that another model left."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from stemma.models.adapter import base_model
from stemma.models.layer_attention import KERNEL_PREFIX

__all__ = ["active_adapters", "fingerprint"]

_NOT_COMPUTED_WITH = frozenset(
    ("_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "return_dict", "use_cache")
) | {"transformers_version"}
"""Entries of a config that no key depends on, or that weights tell."""

_STRENGTHS = ("scaling", "use_dora", "fan_in_fan_out")
"""What a tuned layer of peft computes with beside tensors."""


def active_adapters(model: nn.Module) -> tuple[object, ...]:
    """Which adapters of peft, how strongly, and which learned prefixes take part in a forward now."""
    found: list[object] = []
    for module in base_model(model).modules():
        if hasattr(module, "merged_adapters"):
            switches = [str(module.active_adapters), bool(module.disable_adapters), str(module.merged_adapters)]
            found.append((*switches, *(str(getattr(module, name, None)) for name in _STRENGTHS)))
        prefix: Any = module._modules.get(KERNEL_PREFIX)
        if prefix is not None:
            found.append(prefix.active)
    return tuple(found)


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests by which another process knows the model again.

    Reads all weights once, about 1 GB a second, and moves them to the CPU for it, a tensor at a time.

    Returns:
        `model_type`, `dtype`, and digests of `config`, `weights` and `adapters`.
    """
    inner = base_model(model)
    config = {name: value for name, value in inner.config.to_dict().items() if name not in _NOT_COMPUTED_WITH}
    weights = hashlib.sha256()
    for name, tensor in inner.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]  # a buffer
    return {
        "model_type": str(inner.config.model_type),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "config": _digest(json.dumps(config, sort_keys=True, default=str)),
        "weights": weights.hexdigest()[:32],
        "adapters": _digest(str(active_adapters(model))),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
