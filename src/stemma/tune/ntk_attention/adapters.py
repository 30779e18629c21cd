"""Several learned prefixes on one model, by name, under the names that peft has for the same things."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stemma.attention.decode import merge
from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, is_enabled
from stemma.models.layer_attention import KERNEL_PREFIX, layer_name
from stemma.models.support import refuse_meta
from stemma.scoring.enable import disable, enable
from stemma.tune.ntk_attention.kernel_prefix import KernelPrefix

__all__ = [
    "active_adapters",
    "adapter_names",
    "adapter_of",
    "add_adapter",
    "check_new_name",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "enabled",
    "set_adapter",
]


class NamedPrefixes(nn.ModuleDict):
    """The prefixes of one attention module by the name of their adapter; a sub-module of it, which it must ask in every
    forward."""

    chosen: tuple[str, ...] = ()
    """Names of those that `set_adapter` has chosen."""
    disabled = False
    """Whether none of them acts (`disable_adapter`)."""
    read = False
    """Whether attention asked since the attention module was called."""

    @property
    def active(self) -> tuple[str, ...]:
        """Names of those that act."""
        return () if self.disabled else self.chosen

    def forward(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """The merged attention over the active prefixes, which is that of one prefix with their sums added up; see
        `KernelPrefix`."""
        self.read = True
        found: tuple[Tensor, Tensor] | None = None
        for name in self.active:
            partial = self[name](query, scale)
            found = partial if found is None else merge(*found, *partial)
        return found

    def add_to(self, module: nn.Module) -> None:
        """Become the sub-module."""
        setattr(module, KERNEL_PREFIX, self)
        self._handles = [module.register_forward_pre_hook(_forget), module.register_forward_hook(_refuse_unread)]

    def remove_from(self, module: nn.Module) -> None:
        """Undo `add_to`."""
        for handle in self._handles:
            handle.remove()
        delattr(module, KERNEL_PREFIX)


def _forget(module: Any, arguments: Any) -> None:
    module.get_submodule(KERNEL_PREFIX).read = False


def _refuse_unread(module: Any, arguments: Any, output: Any) -> None:
    prefixes = module.get_submodule(KERNEL_PREFIX)
    if prefixes.active and not prefixes.read:
        raise UnsupportedModelError(
            f"{layer_name(module)} has a learned prefix but did not attend through stemma's attention, so the prefix "
            "was ignored. Call stemma.enable(model, self_test=False), or disable the adapter."
        )


def prefixes_of(model: Any) -> dict[nn.Module, NamedPrefixes]:
    """The prefixes of all attention modules that have any."""
    modules = list(base_model(model).modules())
    return {module: getattr(module, KERNEL_PREFIX) for module in modules if hasattr(module, KERNEL_PREFIX)}


def adapter_of(model: Any, adapter_name: str) -> dict[nn.Module, Any]:
    """The `KernelPrefix` of each attention module that an adapter has one for."""
    return {module: each[adapter_name] for module, each in prefixes_of(model).items() if adapter_name in each}


def adapter_names(model: Any) -> list[str]:
    """Names of the attached adapters, the first attached first."""
    return list(dict.fromkeys(name for prefixes in prefixes_of(model).values() for name in prefixes))


def active_adapters(model: Any) -> list[str]:
    """Names of the active adapters."""
    return list(dict.fromkeys(name for prefixes in prefixes_of(model).values() for name in prefixes.active))


def check_new_name(model: Any, adapter_name: str) -> None:
    """Refuse the name of an attached adapter, and what cannot be a part of a parameter's name.

    Raises:
        ValueError: says why.
    """
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"there is an adapter {adapter_name!r} already; choose another adapter_name, or delete_adapter it first."
        )
    if not adapter_name or "." in adapter_name or hasattr(NamedPrefixes(), adapter_name):
        raise ValueError(f"an adapter cannot be named {adapter_name!r}; choose a plain word.")


@contextmanager
def enabled(model: Any) -> Iterator[None]:
    """Enable the model, if it is not; undone when what follows is refused.

    Raises:
        UnsupportedModelError: its weights are on the meta device, where nothing shows what its attention is.
    """
    refuse_meta(model)
    was = is_enabled(model)
    if not was:
        enable(model)
    try:
        yield
    except Exception:
        if not was:
            disable(model)
        raise


def add_adapter(model: Any, adapter_name: str, made: dict[nn.Module, KernelPrefix], *, freeze: bool) -> None:
    """Add prefixes to attention modules under a new name, and make them the active adapter.

    With `freeze` nothing else is to be trained but what adapters of peft train.
    """
    if freeze:
        inner = base_model(model)
        kept = {id(parameter) for parameter in _peft_parameters(inner)}
        for parameter in inner.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
    disabled = any(prefixes.disabled for prefixes in prefixes_of(model).values())
    for module, kernel in made.items():
        if not hasattr(module, KERNEL_PREFIX):
            prefixes = NamedPrefixes()
            prefixes.disabled = disabled
            prefixes.add_to(module)
        getattr(module, KERNEL_PREFIX)[adapter_name] = kernel
    set_adapter(model, adapter_name)


def _peft_parameters(inner: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of peft's adapters, which its layers list by the names of their sub-modules."""
    for module in inner.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                yield from part.parameters()


def set_adapter(model: Any, adapter_name: str | Sequence[str]) -> None:
    """Let one adapter act, or several together; their sums add up. They are the ones to be trained from now on.

    Raises:
        ValueError: there is no such adapter, a name twice, or none (`disable_adapter` is for that).
    """
    chosen, known = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name), adapter_names(model)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"adapter_name must be one or more different ones of {known}, got {adapter_name!r}.")
    for prefixes in prefixes_of(model).values():
        prefixes.chosen = tuple(name for name in chosen if name in prefixes)
        for name, kernel in prefixes.items():
            kernel.requires_grad_(name in chosen)


def delete_adapter(model: Any, adapter_name: str) -> None:
    """Take one adapter off; should it be the only active one, none is afterwards.

    Raises:
        ValueError: there is no such adapter.
    """
    if adapter_name not in (known := adapter_names(model)):
        raise ValueError(f"there is no adapter {adapter_name!r}; there are {known}.")
    for module, prefixes in prefixes_of(model).items():
        if adapter_name in prefixes:
            del prefixes[adapter_name]
            prefixes.chosen = tuple(name for name in prefixes.chosen if name != adapter_name)
            if not prefixes:
                prefixes.remove_from(module)


def detach(model: Any) -> Any:
    """Take all adapters off; returns the model."""
    for name in adapter_names(model):
        delete_adapter(model, name)
    return model


@contextmanager
def disable_adapter(model: Any) -> Iterator[None]:
    """The model without its adapters, for a while. Those that are attached or chosen meanwhile act afterwards."""
    before = [prefixes.disabled for prefixes in prefixes_of(model).values()]
    for prefixes in prefixes_of(model).values():
        prefixes.disabled = True
    try:
        yield
    finally:
        for prefixes in prefixes_of(model).values():
            prefixes.disabled = any(before)
