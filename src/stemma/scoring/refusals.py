"""What would make a shared forward differ from each sequence alone, refused before any work.

A prefix is computed once for all sequences below it, so nothing in the model may depend on the row that a token stands
in: no random numbers, no adapter that looks at the whole row.
"""

import re
import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, input_device, is_enabled, uncompiled
from stemma.models.limits import dynamic_rope_limit, vocabulary_size
from stemma.models.support import refuse_adapters_of_rows, refuse_compiled_parts, refuse_meta
from stemma.prefix.tree import PrefixTree

__all__ = ["check_model", "check_streaming"]


def check_model(model: nn.Module) -> None:
    """Refuse what a shared prefix cannot have: no `enable`, random numbers, adapters that look at the row.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    model, inner = uncompiled(model), base_model(model)
    if not is_enabled(model):
        raise UnsupportedModelError(
            f"{type(inner).__name__} has not been enabled for shared prefixes; call stemma.enable(model) first. "
            '(stemma.score and stemma.backward do without it in mode="plain".)'
        )
    if getattr(inner.config, "output_attentions", False):
        raise UnsupportedModelError(
            "config.output_attentions asks for attention weights, which tree attention never forms. "
            'Set it to False. (stemma.score and stemma.backward leave it alone in mode="plain".)'
        )
    refuse_meta(model)
    refuse_compiled_parts(model)
    refuse_adapters_of_rows(model)
    if any(module.training for module in model.modules()):
        _refuse_randomness(model, inner, [_randomness_of(module) for module in model.modules()])


# ---------------------------------------------------------------------- random numbers in training mode

_RANDOM = re.compile("^(?!summary|classif).*(drop|jitter|noise)")
"""Fields of a config that stand for random numbers; of them a language model leaves alone what heads of other tasks
use."""

_repeatable: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The state, as of `_randomness_of`, with which two forwards of a model agreed."""


def _randomness_of(module: nn.Module) -> tuple[object, ...]:
    """What tells that a module may draw other random numbers than before: itself, its mode, its hooks (ids are never
    used twice), a forward of its own and its numbers, of which a rate of dropout is one."""
    own = vars(module)
    numbers = [value for value in own.values() if type(value) is float]
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    # Ids, as a reference to a bound forward would keep the model.
    return id(module), module.training, hooks, id(own.get("forward")), numbers


def _refuse_randomness(model: nn.Module, inner: PreTrainedModel, state: object) -> None:
    """Refuse what is drawn once for a shared prefix and again and again for repeated ones."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            name = next(name for name, found in model.named_modules() if found is module)
            raise UnsupportedModelError(
                f"active dropout {module.p} in '{name}': a shared prefix would be dropped once where repeated prefixes "
                "are dropped differently each time. Set the dropout to 0 (lora_dropout=0 for LoRA), or call "
                "model.eval()."
            )
    embedding = inner.get_input_embeddings()
    if embedding.training and getattr(embedding, "neftune_noise_alpha", None):
        raise UnsupportedModelError(
            "neftune_noise_alpha adds noise to the embeddings, which a shared prefix would get once where repeated "
            "prefixes get other noise each time. Leave it unset, or call model.eval()."
        )
    config = inner.config.get_text_config()
    settings = {name: value for name, value in vars(config).items() if _RANDOM.search(name) and _is_positive(value)}
    sharded = any(isinstance(p, DTensor) or p.numel() == 0 for p in inner.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )
    if sharded:  # forwards of its own would have to happen on every rank: the config must do
        repeats = not settings
    else:
        rare = inner.training and settings.keys() & {"layerdrop", "router_jitter_noise"}
        repeats = not rare and _repeats(inner, state)
    if not repeats:
        named = ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
        raise UnsupportedModelError(
            f"{type(inner).__name__} draws random numbers in training mode"
            f"{f' (its config has {named})' if named else ''}: a shared prefix would be drawn for once where repeated "
            "prefixes are drawn for each time. Set dropout, jitter and noise to 0, or call model.eval()."
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _repeats(inner: PreTrainedModel, state: object) -> bool:
    """Whether two forwards of a short row agree whatever the random numbers are; asked once for each state."""
    if _repeatable.get(inner) == state:
        return True
    device = input_device(inner)
    ids = torch.arange(3, 19, device=device)[None] % vocabulary_size(inner)
    cuda = [device] if device.type == "cuda" else []

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = inner(input_ids=ids, use_cache=False).logits
        return found.double()

    with torch.no_grad(), torch.random.fork_rng(cuda), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # activation checkpointing finds no gradient
        first, again, other = (logits(seed) for seed in (0, 0, 1))
    noise, change = (first - again).abs().max(), (first - other).abs().max()
    # On an accelerator sums may be in another order each time. On a CPU what differs in spite of the same seed comes
    # from another generator.
    if bool(change > 10 * noise) or (device.type == "cpu" and bool(noise > 0)):
        return False
    _repeatable[inner] = state
    return True


# ---------------------------------------------------------------------- streaming


def check_streaming(model: nn.Module, tree: PrefixTree) -> None:
    """Refuse to stream: forward and backward run several times in one step, on each rank as often as its tree asks.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    limit = dynamic_rope_limit(model)
    if limit is not None and tree.max_length > limit:
        raise UnsupportedModelError(
            f"the model's rotary frequencies change for calls that reach beyond {limit} tokens (dynamic or longrope "
            f"scaling), so the parts of a streamed tree of up to {tree.max_length} tokens would not fit together. "
            "Raise max_tokens until the tree fits one call."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "a streamed tree makes another number of forward calls on each rank, and a sharded model (FSDP, tensor "
            "parallel) needs the same number everywhere. Raise max_tokens, or give each rank fewer sequences."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.require_backward_grad_sync:
        raise UnsupportedModelError(
            "a streamed tree runs backward several times, and DistributedDataParallel would reduce gradients each "
            "time. Call it inside model.no_sync() and reduce the gradients afterwards, or raise max_tokens."
        )
