"""The options of a call of `stemma.generate`: merged as transformers merges them, refused where they cannot be kept."""

import inspect
import math
from copy import deepcopy
from operator import index as index_of
from typing import TYPE_CHECKING, Any

from transformers import EosTokenCriteria, StoppingCriteriaList, StopStringCriteria

from stemma.decode.row_ends import RowEnds
from stemma.errors import UnsupportedModelError
from stemma.models.tokens import as_id_list

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Options"]

_REFUSED = {
    "past_key_values": "generate makes the cache itself; give what all prompts begin with as prefix=",
    "inputs_embeds": "prefixes are shared by token ids; give prompts",
    "inputs": "give prompts",
    "input_ids": "give prompts",
    "attention_mask": "give prompts without padding; it is added here",
    "token_healing": "it changes prompts inside generate; give the ids that model.heal_tokens(ids, tokenizer) returns",
    "custom_generate": "what it would do with the cache and return is not known; call model.generate",
}
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_OF_SAMPLING: dict[str, tuple[float, ...]] = {"temperature": (0, 1), "top_p": (1,), "top_k": (0,)}
"""Options that only sampling reads, and their values that change nothing without it."""
_UNSHARED = 'leave it out, or write sharing=Config(share="never")'


class Options:
    """What `model.generate` will arrive at, and the arguments that make it do so.

    Args:
        model: the model.
        tokenizer: its tokenizer, for ids that no config has.
        given: the user's config.
        options: the user's other options; None switches one off that a config has.
        shared: whether prefixes are shared.

    Raises:
        ValueError: an option that the model does not take, that is no number, or that cannot be combined with shared
            prefixes.
        UnsupportedModelError: attention weights as output of shared attention.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        given: "GenerationConfig | None",
        options: dict[str, Any],
        *,
        shared: bool,
    ) -> None:
        self._model, self._given, self._options, self._shared = model, given, options, shared
        self.config, _ = model._prepare_generation_config(given, **options)
        """The generation config of the call, ends and padding included."""
        config = self.config
        for name, advice in _REFUSED.items():
            value = options.get(name, getattr(config, name, None))
            if value is not None and value is not False:
                raise ValueError(f"{name} cannot be given to stemma.generate: {advice}.")
        if shared:
            _check_shared(config, options)
        _check(model, tokenizer, config, options, shared)
        ends = as_id_list(config.eos_token_id)
        if config.eos_token_id is None and "eos_token_id" not in options and tokenizer is not None:
            ends = as_id_list(tokenizer.eos_token_id)
        pads = (config.pad_token_id, None if tokenizer is None else tokenizer.pad_token_id, *ends[:1])
        self.padding = next((int(pad) for pad in pads if pad is not None), None)
        """Id that fills rows; None where nobody has one and any id will do."""
        config.eos_token_id, config.pad_token_id = ends or None, self.padding or 0
        criteria = list(options.get("stopping_criteria") or ())
        if ends:
            criteria.append(EosTokenCriteria(ends))
        if config.stop_strings is not None:
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        self.ends = RowEnds(criteria, config.num_beams or 1)
        """Where rows ended, once they have."""

    def most_new_tokens(self, longest: int) -> int:
        """Most new tokens of a row, as transformers counts them behind prompts of up to `longest` tokens.

        Raises:
            ValueError: there is no room for one.
        """
        config, (given, options) = self.config, (self._given, self._options)
        if config.max_new_tokens is not None:
            try:
                most = index_of(config.max_new_tokens)
            except TypeError:
                raise ValueError(f"max_new_tokens must be a whole number, got {config.max_new_tokens!r}.") from None
            if most < 1:
                raise ValueError(f"max_new_tokens must be at least 1, got {most}.")
            return most
        set_by = (given, self._model.generation_config)
        lengths = [options.get("max_length"), *(getattr(each, "max_length", None) for each in set_by)]
        if all(length is None for length in lengths):  # what transformers then takes
            positions = getattr(self._model.config, "max_position_embeddings", None)
            return min(config.max_length, max(1, positions - longest)) if positions else config.max_length
        if config.max_length <= longest:
            raise ValueError(
                f"max_length={config.max_length} leaves no room behind a prompt of {longest} tokens; raise it, or give "
                "max_new_tokens instead."
            )
        return config.max_length - longest

    def arguments(self, most_new_tokens: int) -> dict[str, Any]:
        """Arguments of `model.generate` beside the rows and the cache."""
        config, given = self.config, self._given
        arguments = self._options | {
            "max_new_tokens": most_new_tokens,
            "max_length": None,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "stop_strings": None,  # among the criteria
            "stopping_criteria": StoppingCriteriaList([self.ends]),
        }
        if self._shared and config.cache_implementation is not None:  # "dynamic", beside which no cache may be given
            arguments["cache_implementation"] = None
        if given is not None:  # transformers warns of options beside a config, but has no other way to switch one off
            given = deepcopy(given)
            for name in [name for name, value in arguments.items() if value is not None and hasattr(given, name)]:
                setattr(given, name, arguments.pop(name))
            arguments["generation_config"] = given
        return arguments


def _check(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    config: "GenerationConfig",
    options: dict[str, Any],
    shared: bool,
) -> None:
    """Refuse now what transformers would refuse once the prompts are encoded, and options that would do nothing."""
    from transformers import GenerationMixin

    taken = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    for function in (GenerationMixin.generate, type(model).generate):
        taken |= set(inspect.signature(function).parameters)
    taken |= {name for name in options if hasattr(config, name)}
    inputs = {name: value for name, value in options.items() if name not in taken}
    model._validate_model_kwargs(dict(inputs))
    if shared and inputs:
        raise ValueError(
            f"{next(iter(inputs))} is an input of the model beside token ids, which shared prefixes are not encoded "
            f"with; {_UNSHARED}."
        )
    mode = config.get_generation_mode(options.get("assistant_model"))
    model._validate_generation_mode(mode, config, {name: options[name] for name in ("streamer",) if name in options})
    if config.stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings are looked for in texts, which needs a tokenizer; give the model's.")
    for name, value in config.to_dict().items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} is not a number (nan).")
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
