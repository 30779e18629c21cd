"""Limits of a model: positions, vocabulary, shapes; what a batch may hold."""

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from stemma.errors import InvalidBatchError
from stemma.models.adapter import base_model
from stemma.prefix.economy import ModelShape
from stemma.prefix.tree import PrefixTree

__all__ = [
    "check_batch",
    "check_lengths",
    "check_prompts",
    "dynamic_rope_limit",
    "max_positions",
    "model_shape",
    "vocabulary_size",
]


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids that the model has embeddings for."""
    inner = base_model(model)
    vocabulary = int(inner.config.get_text_config().vocab_size)  # some types embed more, as for parts of an image
    return min(vocabulary, int(getattr(inner.get_input_embeddings(), "num_embeddings", vocabulary)))


def max_positions(model: nn.Module) -> int | None:
    """Most tokens of a sequence (`max_position_embeddings`), None where the config says no limit."""
    limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_batch(model: nn.Module, tree: PrefixTree) -> None:
    """Refuse token ids outside the vocabulary and sequences longer than the model's positions.

    Raises:
        InvalidBatchError: says which and how long.
    """
    vocabulary, worst = vocabulary_size(model), int(tree.packed_tokens.max())
    if worst >= vocabulary:
        raise InvalidBatchError(
            f"token id {worst} lies outside the model's vocabulary of {vocabulary}. Are tokenizer and model a pair?"
        )
    limit = max_positions(model)
    if limit is not None and limit < tree.max_length:
        raise InvalidBatchError(
            f"the longest sequence has {tree.max_length} tokens, the model {limit} positions "
            "(max_position_embeddings). Shorten the sequences or use a model with a longer context."
        )


def check_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    name: Callable[[int], str] = "prompt {}".format,
) -> None:
    """Refuse prompts that the model cannot continue by so many tokens.

    Args:
        name: what to call the prompt of an index.

    Raises:
        InvalidBatchError: there is no prompt, or names the first one that is empty, too long, or has a token id outside
            the vocabulary.
    """
    if not prompts:
        raise InvalidBatchError("there are no prompts to continue; pass at least one list of token ids")
    vocabulary, limit = vocabulary_size(model), max_positions(model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidBatchError(f"{name(index)} is empty; a continuation needs at least one token to start from")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise InvalidBatchError(f"{name(index)} has token id {wrong}, outside the vocabulary of {vocabulary}")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise InvalidBatchError(
                f"{name(index)} has {len(prompt)} tokens; with {max_new_tokens} more (max_new_tokens) it exceeds the "
                f"model's {limit} positions. Shorten the prompt or ask for fewer tokens"
            )


def dynamic_rope_limit(model: nn.Module) -> int | None:
    """Length from which the model's rotary frequencies depend on the longest sequence of a call, None if they never do.

    Such a model ("dynamic" and "longrope" scaling) gives a short sequence other log-probabilities in the company of a
    long one, with or without Stemma.
    """
    config = base_model(model).config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or {}
    kinds = [scaling, *(value for value in scaling.values() if isinstance(value, dict))]
    limits = []
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            own = kind.get("original_max_position_embeddings") if kind["rope_type"] == "longrope" else None
            limits.append(int(own or config.max_position_embeddings))
    return min(limits, default=None)


def check_lengths(model: nn.Module, longest: int) -> None:
    """Refuse sequences of so many tokens, new ones included, where the model has fewer positions or changes its rotary
    frequencies with the length.

    Raises:
        InvalidBatchError: says the limit.
    """
    limit = max_positions(model)
    if limit is not None and limit < longest:
        raise InvalidBatchError(
            f"the longest sequence would have {longest} tokens, new ones included, and the model has {limit} positions "
            "(max_position_embeddings). Shorten the prompts or ask for fewer new tokens."
        )
    rope = dynamic_rope_limit(model)
    if rope is not None and longest > rope:
        raise InvalidBatchError(
            f"from {rope} tokens on, the model's rotary frequencies depend on the length of the sequence, so keys of a "
            f"prefix do not hold for all that follows; the longest would have {longest}. Shorten the prompts, or "
            "generate without shared prefixes."
        )


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The cost-relevant sizes of a model, from its weights' shapes and its config."""
    config = model.config.get_text_config()

    def number(name: str, default: int) -> int:
        try:
            value = getattr(config, name)
        except Exception:  # missing, or kept for each layer apart (transformers raises an error of its own for that)
            return default
        return int(value) if isinstance(value, int) and value else default

    heads = number("num_attention_heads", 1)
    hidden = number("hidden_size", model.get_input_embeddings().weight.shape[1])
    head_dim = number("head_dim", hidden // heads)
    key_heads = number("num_key_value_heads", heads)
    layers = number("num_hidden_layers", 1)
    window = number("sliding_window", 0) if getattr(config, "use_sliding_window", True) else 0
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    experts = number("num_local_experts", number("num_experts", 0))
    active = number("num_experts_per_tok", 0)
    body = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings or parameter.dim() < 2:
            continue
        share = active / experts if experts and active and ".experts" in name else 1.0
        body += parameter.numel() * share
    return ModelShape(
        body_weights=int(body),
        query_width=heads * head_dim,
        key_value_width=key_heads * head_dim,
        hidden_size=hidden,
        vocabulary=vocabulary_size(model),
        windows=tuple((window or None) if kind == "sliding_attention" else None for kind in types[:layers]),
        bytes_per_value=next(model.parameters()).element_size(),
    )
