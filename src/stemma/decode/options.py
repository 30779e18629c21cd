"""The options of a call of `stemma.generate`: merged as transformers merges them, refused where they cannot be kept."""

import inspect
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stemma.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["merge", "new_tokens"]

_REFUSED = {
    "past_key_values": "generate makes the cache itself; give what all prompts begin with as prefix=",
    "inputs_embeds": "prefixes are shared by token ids; give prompts",
    "inputs": "give prompts",
    "input_ids": "give prompts",
    "attention_mask": "give prompts without padding; it is added here",
    "custom_generate": "what it would do with the cache and return is not known; call model.generate",
}
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_OF_SAMPLING: dict[str, tuple[float, ...]] = {"temperature": (0, 1), "top_p": (1,), "top_k": (0,)}
"""Options that only sampling reads, and their values that change nothing without it."""
_UNSHARED = 'leave it out, or write sharing=Config(share="never")'


def merge(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    given: "GenerationConfig | None",
    options: dict[str, Any],
    *,
    max_new_tokens: int,
    shared: bool,
) -> "tuple[GenerationConfig, dict[str, Any]]":
    """The generation config that `model.generate` will arrive at, and the arguments that make it do so.

    Args:
        model: the model.
        tokenizer: its tokenizer, for ids that no config has.
        given: the user's config.
        options: the user's other options; None switches one off that a config has.
        max_new_tokens: most new tokens of a row.
        shared: whether prefixes are shared.
    """
    for name, advice in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} cannot be given to stemma.generate: {advice}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    config, _ = model._prepare_generation_config(given, **options)
    if shared:
        _check_shared(config, options)
    _check(model, tokenizer, config, options)
    arguments = options | {"max_new_tokens": max_new_tokens}
    ends = config.eos_token_id
    if ends is None and "eos_token_id" not in options and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is not None:
        ends = torch.as_tensor(ends).reshape(-1).tolist() or None
        arguments["eos_token_id"] = ends
    pads = (config.pad_token_id, None if tokenizer is None else tokenizer.pad_token_id, ends and ends[0], 0)
    arguments["pad_token_id"] = next(int(pad) for pad in pads if pad is not None)
    config.eos_token_id, config.pad_token_id = ends, arguments["pad_token_id"]
    if shared and config.cache_implementation is not None:  # "dynamic", beside which no cache may be given
        arguments["cache_implementation"] = None
    if config.stop_strings is not None:
        arguments["tokenizer"] = tokenizer
    if given is not None:  # transformers warns of options beside a config, but has no other way to switch one off
        given = deepcopy(given)
        for name in [name for name, value in arguments.items() if value is not None and hasattr(given, name)]:
            setattr(given, name, arguments.pop(name))
        arguments["generation_config"] = given
    return config, arguments


def _check(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    config: "GenerationConfig",
    options: dict[str, Any],
) -> None:
    """Refuse now what transformers would refuse once the prompts are encoded, and options that would do nothing."""
    from transformers import GenerationMixin

    taken = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    for function in (GenerationMixin.generate, type(model).generate):
        taken |= set(inspect.signature(function).parameters)
    taken |= {name for name in options if hasattr(config, name)}
    model._validate_model_kwargs({name: value for name, value in options.items() if name not in taken})
    mode = config.get_generation_mode(options.get("assistant_model"))
    model._validate_generation_mode(mode, config, {name: options[name] for name in ("streamer",) if name in options})
    if config.stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings are looked for in texts, which needs a tokenizer; give the model's.")
    if not config.do_sample:
        for name, idle in _OF_SAMPLING.items():
            if options.get(name) not in (None, *idle):
                raise ValueError(f"{name}={options[name]} is of sampling; set do_sample=True, or leave it out.")


def _check_shared(config: "GenerationConfig", options: dict[str, Any]) -> None:
    """Refuse what cannot be done with a cache of shared prefixes."""
    mode = config.get_generation_mode(options.get("assistant_model"))
    for name in _ASSISTED:
        if getattr(config, name, options.get(name)) not in (None, False):
            raise ValueError(f"{name}: a cache of shared prefixes is not made for assisted decoding; {_UNSHARED}.")
    if mode not in _MODES:
        raise ValueError(f"a cache of shared prefixes is not made for {mode.value.replace('_', ' ')}; {_UNSHARED}.")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} and shared prefixes are two caches; {_UNSHARED}."
        )
    if config.use_cache is False:
        raise ValueError(f"use_cache=False leaves nothing to share; {_UNSHARED}.")
    if config.output_attentions:
        raise UnsupportedModelError(
            f"output_attentions asks for attention weights, which shared attention never forms; {_UNSHARED}."
        )


def new_tokens(new: Tensor, config: "GenerationConfig", options: dict[str, Any]) -> list[list[int]]:
    """Rows up to their first end-of-sequence token, without the padding of rows that ended otherwise.

    Only stop strings and stopping criteria end a row otherwise, and the longest row, so a single one, has no padding.
    """
    ends, pad = set(config.eos_token_id or ()), config.pad_token_id
    stopped = bool(config.stop_strings or options.get("stopping_criteria"))
    padded = stopped and len(new) > 1 and pad not in ends and (ends or config.num_beams > 1)
    found = []
    for row in new.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), None)
        if end is None:
            end = len(row)
            while padded and end and row[end - 1] == pad:
                end -= 1
        found.append(row[:end])
    return found
