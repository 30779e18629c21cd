"""What config and modules of a model show about whether it can run over prefix trees, without a forward."""

import inspect
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, input_device, model_label, uncompiled

__all__ = [
    "not_dispatching",
    "refuse_adapters_of_rows",
    "refuse_by_structure",
    "refuse_compiled_parts",
    "refuse_meta",
    "refuse_unsuitable",
]

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def not_dispatching(model: PreTrainedModel) -> UnsupportedModelError:
    """The refusal of a model whose layers do not look up their attention function."""
    return UnsupportedModelError(
        f"{model_label(model)} does not dispatch its attention through transformers' AttentionInterface, so its "
        "attention cannot be computed over a tree. Use a model type listed as exact in docs/support.md."
    )


def refuse_unsuitable(model: PreTrainedModel) -> None:
    """Refuse what no decoder over a prefix tree can be.

    Raises:
        UnsupportedModelError: names the model type and the reason.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{model_label(model)} is an encoder-decoder; a prefix tree needs a decoder-only causal language model."
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise UnsupportedModelError(
            f"{model_label(model)} has no single language-model head. Load it with AutoModelForCausalLM."
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{model_label(model)} attends in both directions; prefixes can be shared only under causal attention."
        )
    if getattr(config.get_text_config(), "attn_temperature_tuning", False) and config.model_type.startswith("llama4"):
        raise UnsupportedModelError(
            f"{model_label(model)} scales its attention by the index in the row instead of position_ids "
            "(attn_temperature_tuning), which in a packed row is another number."
        )
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not any(part._can_set_attn_implementation() for part in parts):
        raise not_dispatching(model)


def refuse_by_structure(model: nn.Module) -> None:
    """Refuse what config and modules show, without a forward: for models whose self-test has not run.

    A model that passes is not known to be exact; only the self-test and `stemma.check` compare numbers.

    Raises:
        UnsupportedModelError: names the model type and the reason.
    """
    inner = base_model(model)
    refuse_unsuitable(inner)
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    if getattr(inner, "_is_stateful", False) or kinds:
        found = f"layers of the kind {', '.join(sorted(kinds))}" if kinds else "a state that is carried along"
        raise UnsupportedModelError(
            f"{model_label(inner)} has {found}; a prefix tree needs full or sliding-window attention in all layers, "
            "because recurrence, convolution, linear and sparse attention cannot branch with a tree."
        )
    causal = {module.is_causal for module in inner.modules() if hasattr(module, "is_causal")}
    if causal == {False}:
        raise UnsupportedModelError(
            f"{model_label(inner)} is an encoder: it attends in both directions; prefixes can be shared only under "
            "causal attention (is_decoder=True in the config of a decoder)."
        )
    parts = [part for part in inner.modules() if isinstance(part, PreTrainedModel)]
    if not any("position_ids" in inspect.signature(part.forward).parameters for part in parts):
        raise UnsupportedModelError(
            f"{model_label(inner)} takes no position_ids: it counts positions by itself, which in a tree are others."
        )


def refuse_adapters_of_rows(model: nn.Module) -> None:
    """Refuse active adapters of peft that depend on the row that a token stands in, so that its keys and values hold in
    no other: learned tokens in front of each row, or LoRA that waits for its invocation.

    Raises:
        UnsupportedModelError: names the adapter and what to do.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter of learned tokens ({type(config).__name__}), which peft puts in "
            "front of every row by itself, so rows cannot share a prefix. Use an adapter of weights such as LoRA, "
            "convert prefix tuning (see stemma.tune), or use the model's own generate."
        )
    for module in model.modules():
        variants = module.__dict__.get("lora_variant") or {}
        active: Any = () if not variants or module.disable_adapters else module.active_adapters
        if any(type(variants.get(name)).__name__.startswith("ALora") for name in active):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an activated LoRA adapter (alora_invocation_tokens), which looks for its "
                "invocation in each row, so tokens of a shared prefix differ from row to row. Use an ordinary LoRA "
                "adapter, or the model's own generate."
            )


def refuse_meta(model: nn.Module) -> None:
    """Refuse weights that are only described (and not offloaded to where accelerate finds them).

    Raises:
        UnsupportedModelError: names the model.
    """
    if input_device(model).type == "meta":
        raise UnsupportedModelError(
            f"the weights of {type(base_model(model)).__name__} are on the meta device, so nothing can be computed "
            "with them. Load them; stemma.explain does without."
        )


def refuse_compiled_parts(model: nn.Module) -> None:
    """Refuse a model of which a part, or which in place, is compiled; `torch.compile(model)` is looked behind.

    Raises:
        UnsupportedModelError: names the part.
    """
    for module in uncompiled(model).modules():
        if isinstance(module, OptimizedModule) or module.__dict__.get("_compiled_call_impl") is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}, a part of the model or all of it, is compiled, and what is compiled cannot "
                "run over a prefix tree. Use torch.compile(model) on the whole, which is looked behind here, not "
                "model.compile() or compiled layers."
            )
