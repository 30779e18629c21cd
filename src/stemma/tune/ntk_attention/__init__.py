"""NTK-Attention: a prefix of any length as one matrix and one vector per head.

Use it to fine-tune a model with a prefix, or to replace a long given prefix (a system prompt) by something smaller.
Prefix tuning trains `m` keys and values per head and pays for each of them in every step; this adapter has `r d + r`
parameters per head and one cost, however long the prefix it replaces.

Source: "Towards Infinite-Long Prefix in Transformer", 2024, arXiv 2406.14036. With a feature map `phi` for which
`phi(q) . phi(k) ~ exp(q . k / sqrt(d))`, and `A_ij = exp(q_i . k_j / sqrt(d))` over the ordinary keys:

| the paper | here |
|---|---|
| `phi(x) = elu(x / d^(1/4)) + 1` (its code) | `stemma.attention.kernelized.FeatureMap` |
| `Z = sum_j phi(k_j) v_j^T`, `k = sum_j phi(k_j)` | `kernel_sums`, parameters of a `KernelPrefix` per layer |
| `(A V + phi(Q) Z) / (A 1 + phi(Q) k)` | attention merged with `phi(q) Z / (phi(q) . k)`, of weight `phi(q) . k` |

What we changed and why:

- The two are merged by log-sum-exp and the positive map is handled by its logarithm, so that no score overflows. The
  published order, a maximum taken before masking, gives NaN rows for scores above ten.
- `k` is positive as `exp` of a parameter, not as `|k|`, whose gradient at the usual start 0 is 0. The other parameter
  is `Z / k`, the mean values of the features, so that a step does not depend on the length of the prefix.
- `phi` is divided by `sqrt(d)` (`normalize`): as published, a key of score 0 weighs `d` instead of 1, which makes the
  replacement of a short prefix many times heavier than the prefix.
- Options: other maps (Taylor, positive random features), a low rank of `Z`, a prefix per key head of grouped queries.

The prefix is in no cache: positions, masks and lengths stay as they are. Keys of a given prefix are therefore taken at
the positions before 0 where positions are relative. Sums are additive, so several adapters on one model act as one
prefix (`set_adapter`).

Relations: `stemma.attention.tree` merges the same kind of partial attention for shared prefixes with keys. Prefix
tuning, P-tuning v2 and LoRA are in the package peft; LoRA can be trained together with this.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stemma.attention.kernelized import FeatureMap
from stemma.errors import InvalidDataError, UnsupportedModelError
from stemma.files import replacing, write_json
from stemma.models.adapter import base_model
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.train.seeds import stream_seed
from stemma.tune.ntk_attention.adapters import (
    active_adapters,
    adapter_names,
    adapter_of,
    add_adapter,
    check_new_name,
    delete_adapter,
    detach,
    disable_adapter,
    enabled,
    set_adapter,
)
from stemma.tune.ntk_attention.kernel_prefix import KernelPrefix
from stemma.tune.ntk_attention.prefix_states import (
    PrefixStates,
    attention_calls,
    check_prefix,
    first_position,
    peft_prefix_states,
    prefix_cache,
    prefix_states,
)

__all__ = [
    "Config",
    "ConversionError",
    "active_adapters",
    "adapter_names",
    "attach",
    "conversion_error",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "load_adapter",
    "parameter_count",
    "peft_prefix_states",
    "prefix_states",
    "save_adapter",
    "set_adapter",
]

_TYPE = "STEMMA_NTK_ATTENTION"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the adapter."""

    feature_map: Literal["elu", "taylor", "random"] = "elu"
    """`phi`: `elu + 1` (the paper's code), the exponential series, or positive random features."""
    normalize: bool = True
    """With "elu", divide `phi` by `sqrt(d)`; the paper's code does not."""
    degree: int = 1
    """Degree of "taylor", 1 to 3; `r = 1 + d + ... + d^degree`."""
    num_features: int = 256
    """`r` of "random"."""
    rank: int | None = None
    """Rank of the values' matrix, at least 1; None: full."""
    layers: tuple[int, ...] | None = None
    """Attention layers with a prefix, counted from 0; None: all."""
    heads: tuple[int, ...] | None = None
    """Heads with a prefix (of the kind that `per` names); None: all."""
    per: Literal["query_head", "key_head"] = "query_head"
    """One prefix per query head (the paper), or per key/value head of grouped queries."""
    initial_mass: float | None = None
    """Weight of the untrained prefix, in keys of score 0; None: as many as a head is wide, which is what the published
    map gives one key. A light prefix learns slowly; one of 0 has no effect, and next to no gradient."""
    seed: int = 0
    """Seed of the untrained prefix and of random features."""

    def __post_init__(self) -> None:
        _ = self.map  # refuses its own options
        if self.per not in ("query_head", "key_head"):
            raise ValueError(f"per must be 'query_head' or 'key_head', got {self.per!r}.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None; got {self.rank}.")
        if self.initial_mass is not None and not (self.initial_mass >= 0 and math.isfinite(self.initial_mass)):
            raise ValueError(f"initial_mass must be a finite number of at least 0, or None; got {self.initial_mass}.")
        for name in ("layers", "heads"):  # JSON has lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def map(self) -> FeatureMap:
        """The feature map."""
        return FeatureMap(
            name=self.feature_map, normalize=self.normalize, degree=self.degree, num_features=self.num_features
        )


def attach(
    model: Any,
    config: Config | None = None,
    *,
    adapter_name: str = "default",
    prefix: PrefixStates | None = None,
    freeze: bool = True,
) -> Any:
    """Give attention modules a prefix, as sub-modules whose parameters travel with the model's.

    A model can have several, each under its name; the new one becomes the active one (`set_adapter`).

    ```python
    from stemma.models.tiny import tiny_model
    from stemma.tune.ntk_attention import Config, attach, parameter_count, save_adapter

    model = attach(tiny_model("llama"), Config(per="key_head"))  # now train it as any model, then:
    save_adapter(model, "adapter")
    print(parameter_count(model), "of", sum(p.numel() for p in model.parameters()), "parameters are trained")
    # prints: 2176 of 166592 parameters are trained
    ```

    Args:
        model: a causal language model of transformers, plain or wrapped; enabled if it is not (`stemma.enable`).
            Wrap it in LoRA before, not after: peft freezes what it does not know.
        config: options.
        adapter_name: a new name, a part of the parameters' names.
        prefix: what the prefix is to stand for, from `prefix_states` or `peft_prefix_states`; None: an
            untrained one.
        freeze: let only the new parameters be trained, and what adapters of peft (LoRA) train already; False leaves all
            others as they are, but for other adapters of this kind.

    Returns:
        The same model; one that is refused stays as it was.

    Raises:
        UnsupportedModelError: the attention of the model cannot be merged with a prefix.
        ValueError: a name that is taken, layers or heads that it does not have, a rank above the matrix's, or a prefix
            of another model.
    """
    check_new_name(model, adapter_name)
    if prefix is not None:
        check_prefix(model, prefix)
    with enabled(model):
        made = _make(model, Config() if config is None else config, prefix)
        add_adapter(model, adapter_name, made, freeze=freeze)
    return model


def _make(model: Any, config: Config, prefix: PrefixStates | None) -> dict[nn.Module, KernelPrefix]:
    """The prefixes of an adapter for an enabled model by attention module, not yet added to them."""
    inner = base_model(model)
    implementation = inner.config.get_text_config()._attn_implementation
    if implementation not in ("stemma_sdpa", "stemma_eager"):
        raise UnsupportedModelError(
            f"{type(inner).__name__} uses the attention {implementation.removeprefix('stemma_')!r}, whose masks cannot "
            'be merged with a learned prefix. Load it with attn_implementation="sdpa".'
        )
    found = attention_calls(model, torch.zeros(1, 2, dtype=torch.int64))
    chosen = tuple(range(len(found))) if config.layers is None else config.layers
    if not chosen or not all(0 <= layer < len(found) for layer in chosen):
        raise ValueError(f"layers must be numbers from 0 to {len(found) - 1}, got {config.layers}.")
    made = {}
    for number, (module, (query, key, value, scale)) in enumerate(found.items()):
        if number in chosen:
            made[module] = kernel = KernelPrefix(
                config.map,
                heads=query.shape[1],
                key_heads=key.shape[1],
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
                rank=config.rank,
                per_key_head=config.per == "key_head",
                selected=config.heads,
                seed=stream_seed(config.seed, "kernel prefix", number),
                dtype=value.dtype,
                device=value.device,
            )
            kernel.about = asdict(config)
            if prefix is None:
                kernel.start(scale, config.initial_mass)
            else:
                kernel.fill(*prefix[module], scale)
    return made


def parameter_count(model: Any) -> int:
    """Numbers that the active adapters have to train."""
    made = [kernel for name in active_adapters(model) for kernel in adapter_of(model, name).values()]
    return sum(parameter.numel() for kernel in made for parameter in kernel.parameters())


@dataclass(frozen=True, kw_only=True)
class ConversionError:
    """How far a model with a stand-in is from the model with the prefix itself."""

    max_logit_error: float
    """Largest difference of a logit."""
    kl: float
    """Mean over tokens of the divergence of its predictions from those with the prefix, nats."""
    top1_agreement: float
    """Share of tokens whose likeliest successor is the same."""
    kl_without: float
    """`kl` of the model without any prefix."""
    top1_agreement_without: float
    """`top1_agreement` of the model without any prefix."""


@torch.no_grad()
def conversion_error(model: Any, prefix: PrefixStates, inputs: Tensor) -> ConversionError:
    """Compare the active prefix with the exact one, whose keys and values lie in the cache.

    The inputs begin at position 0 where positions are rotary. Learned ones begin at `m`, behind the exact prefix; a
    model with a stand-in must be given the same `position_ids` to be as close.

    Args:
        model: with an active prefix, in evaluation mode.
        prefix: the exact one.
        inputs: `(rows, length)` token ids that follow, without padding.

    Raises:
        UnsupportedModelError: no prefix is active, or the cache of the model holds no keys and values.
        InvalidBatchError: the prefix is of another model, or too long for learned positions.
    """
    if not active_adapters(model):
        raise UnsupportedModelError("the model has no active learned prefix to compare; attach one first.")
    check_prefix(model, prefix)
    inner, length = base_model(model), inputs.shape[1]
    first = first_position(model, prefix, length)
    positions = torch.arange(first, first + length, device=inputs.device).expand_as(inputs)
    cache = prefix_cache(model, prefix, len(inputs))

    def predict(**extra: Any) -> Tensor:
        logits: Tensor = inner(input_ids=inputs, position_ids=positions, **extra).logits
        return logits.double()

    found = predict(use_cache=False)
    with disable_adapter(model):
        without = predict(use_cache=False)
        exact = predict(past_key_values=cache)

    def kl(logits: Tensor) -> float:
        target = exact.log_softmax(-1)
        return (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean().item()

    def agreement(logits: Tensor) -> float:
        return (logits.argmax(-1) == exact.argmax(-1)).double().mean().item()

    return ConversionError(
        max_logit_error=(found - exact).abs().max().item(),
        kl=kl(found),
        top1_agreement=agreement(found),
        kl_without=kl(without),
        top1_agreement_without=agreement(without),
    )


# ---------------------------------------------------------------------- files


def save_adapter(model: Any, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write one adapter as `adapter_config.json` and `adapter_model.safetensors`, without its name.

    Args:
        model: with an attached adapter.
        folder: made when missing.
        adapter_name: which; None for a model that has one.

    Raises:
        ValueError: there is no such adapter, or several and no name.
    """
    from safetensors.torch import save_file

    known, folder = adapter_names(model), Path(folder)
    if adapter_name is None and len(known) == 1:
        adapter_name = known[0]
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be one of {known}, got {adapter_name!r}; attach an adapter first.")
    made = adapter_of(model, adapter_name)
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(model, made).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary)
    about = {"peft_type": _TYPE, "base_model_name_or_path": getattr(base_model(model).config, "_name_or_path", "")}
    write_json(folder / "adapter_config.json", about | next(iter(made.values())).about)


def load_adapter(
    model: Any, folder: str | os.PathLike[str], adapter_name: str = "default", *, freeze: bool = True
) -> Any:
    """Attach what `save_adapter` wrote, as the active adapter, and return the model; one that is refused stays as
    it was.

    Raises:
        InvalidDataError: the files are missing, of another kind, or do not fit the model.
        ValueError: the name is taken.
    """
    from safetensors.torch import load_file

    check_new_name(model, adapter_name)
    folder = Path(folder)
    try:
        options = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InvalidDataError(f"{folder} holds no adapter that stemma saved: {error}") from error
    if not isinstance(options, dict):
        raise InvalidDataError(
            f"{folder} holds no adapter that stemma saved: adapter_config.json must be an object of options, and is "
            f"{type(options).__name__}; give a folder that save_adapter wrote."
        )
    kind, _ = options.pop("peft_type", None), options.pop("base_model_name_or_path", None)
    if kind != _TYPE:
        raise InvalidDataError(f"{folder} holds an adapter of type {kind!r}, not {_TYPE!r}; load it with peft.")
    with enabled(model):
        try:
            made = _make(model, Config(**options), None)
        except UnsupportedModelError:
            raise
        except (TypeError, ValueError) as error:
            raise InvalidDataError(f"{folder} does not fit the model: {error}") from error
        own = _tensors(model, made)
        shapes, expected = ({name: tuple(t.shape) for name, t in each.items()} for each in (tensors, own))
        if shapes != expected:
            name = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise InvalidDataError(
                f"{folder} does not fit the model: {name} is {shapes.get(name)} there and {expected.get(name)} here."
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        add_adapter(model, adapter_name, made, freeze=freeze)
    return model


def _tensors(model: Any, made: Mapping[nn.Module, KernelPrefix]) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that files have, sharing memory."""
    names = {module: name for name, module in base_model(model).named_modules()}
    return {
        f"{names[module]}.{KERNEL_PREFIX}.{name}": tensor
        for module, kernel in made.items()
        for name, tensor in kernel.state_dict().items()
    }
