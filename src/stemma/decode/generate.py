"""`stemma.generate`: transformers' `generate` with every shared run of tokens encoded, kept and read once."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index as index_of
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stemma.decode.options import merge, new_tokens
from stemma.decode.shared_cache import SharedPrefixCache, SharingReport
from stemma.decode.shared_prefix import SharedPrefix
from stemma.errors import InvalidBatchError
from stemma.models.adapter import base_model
from stemma.models.limits import check_lengths
from stemma.scoring.enable import while_enabled

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Config", "Generations", "generate", "prompt_ids"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How prefixes are shared."""

    share: Literal["auto", "always", "never"] = "auto"
    """"auto" shares a run of tokens where reading it once pays for its kernel call; "always" shares whatever two rows
    have in common; "never" is transformers' `generate` with its own cache, of any kind and length."""
    min_shared: int = 8
    """Shortest common run that is encoded once, in tokens, at least 1."""
    max_tokens: int | None = None
    """Most prompt tokens in one forward call, at least 1; None for no limit."""

    def __post_init__(self) -> None:
        if self.share not in ("auto", "always", "never"):
            raise ValueError(f'share must be "auto", "always" or "never", got {self.share!r}.')
        for name in ("min_shared", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Generations:
    """What `generate` returns: for each of ``B`` prompts its ``G`` sequences."""

    token_ids: list[list[list[int]]]
    """New tokens up to and including the first end-of-sequence token."""
    texts: list[list[str]] | None
    """Their texts without special tokens; None without a tokenizer."""
    output: Any
    """What transformers' `generate` returned: ``(B * G, length)`` whole rows, padded on both sides, or an object with
    ``return_dict_in_generate=True``."""
    report: SharingReport | None
    """What was shared; None with ``share="never"``."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    prefix: SharedPrefix | None = None,
    sharing: Config | None = None,
    generation_config: "GenerationConfig | None" = None,
    **generation_kwargs: Any,
) -> Generations:
    """Generate with transformers' `generate`, with each shared run of tokens encoded, kept and read once.

    The tokens are those of ``model.generate`` on the same prompts, padded on the left, up to rounding of the logits:
    greedy, sampled under the same seed, or from beams.

    ```python
    import stemma
    from stemma.models.tiny import byte_tokenizer, tiny_model

    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    prompts = ["Tell me about rivers. Short:", "Tell me about rivers. Long:"]
    out = stemma.generate(model, tokenizer, prompts, max_new_tokens=4, num_return_sequences=3, do_sample=True)
    print(len(out.texts), "prompts,", len(out.texts[0]), "samples of each")
    # prints: 2 prompts, 3 samples of each
    ```

    Padding never reaches attention, so a tokenizer without a pad token will do: rows are padded with the pad token of
    the generation config, else of the tokenizer, else with the first end-of-sequence token, else with id 0. Rows end at
    the end-of-sequence tokens of the generation config, else of the tokenizer.

    Args:
        model: a causal language model of transformers. One that was not enabled (:func:`stemma.enable`) is enabled for
            the length of the call, which costs its self-test each time.
        tokenizer: of the model; None for prompts of token ids, which then give no texts.
        prompts: ``B`` texts, lists of chat messages (with the tokenizer's template and its generation prompt) or lists
            of token ids.
        max_new_tokens: most new tokens of a row.
        prefix: what all prompts begin with, encoded before; prompts are then what follows it. Texts are tokenized by
            themselves, without special tokens; messages cannot follow a prefix.
        sharing: how prefixes are shared.
        generation_config: of transformers; what it leaves open is as in the model's own.
        generation_kwargs: any other option of ``model.generate``: ``num_return_sequences``, ``num_beams``,
            ``do_sample``, ``temperature``, ``logits_processor``, ``stopping_criteria``, ``stop_strings``, ...; None
            switches off what a config sets, the end-of-sequence token too.

    Raises:
        InvalidBatchError: no prompt, an empty one, one that is not in a list, ids that are no integers, or messages
            that the chat template does not take or that would follow a prefix. Unless ``share="never"``: ids outside
            the vocabulary, more tokens (new ones included) than the model has positions, rotary frequencies that would
            change with the length, or a prefix of another model.
        UnsupportedModelError: unless ``share="never"``: a layer of the model cannot share its keys and values, an
            active dropout, or attention weights as output.
        ValueError: an option that the model does not take or that cannot be combined with shared prefixes, or one of
            sampling without ``do_sample``.
    """
    if sharing is not None and not isinstance(sharing, Config):
        raise ValueError(f'sharing must be a Config, got {sharing!r}; write sharing=Config(share="always"), say.')
    if prefix is not None and not isinstance(prefix, SharedPrefix):
        raise InvalidBatchError(
            f"prefix must be a SharedPrefix, got {type(prefix).__name__}; make one with "
            "stemma.SharedPrefix.from_ids(model, ids)."
        )
    prompts = _listed(prompts)
    sharing = sharing or Config()
    inner: PreTrainedModel = base_model(model)
    shared = sharing.share != "never"
    config, arguments = merge(
        inner, tokenizer, generation_config, generation_kwargs, max_new_tokens=max_new_tokens, shared=shared
    )
    ids = [prompt_ids(tokenizer, prompt, index, prefix is not None) for index, prompt in enumerate(prompts)]
    whole = ids if prefix is None else [[*prefix.ids.tolist(), *row] for row in ids]
    if shared:
        check_lengths(model, max(map(len, whole)) + max_new_tokens)
    rows = max(config.num_beams or 1, config.num_return_sequences or 1)
    device = inner.get_input_embeddings().weight.device
    input_ids, mask = _padded(whole, config.pad_token_id, device)
    report = None
    with while_enabled(model) if shared else nullcontext():
        if shared:
            cache = SharedPrefixCache.of(
                model,
                [row for row in ids for _ in range(rows)],
                prefix=prefix,
                room=max_new_tokens,
                max_tokens=sharing.max_tokens,
                min_shared=sharing.min_shared,
                **({"call_bytes": 0} if sharing.share == "always" else {}),
            )
            report = cache.report(len(ids))
            arguments["past_key_values"] = cache
        output = model.generate(input_ids=input_ids, attention_mask=mask, **arguments)
        if shared:
            cache.check_read()
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    token_ids = new_tokens(sequences[:, input_ids.shape[1] :], config, generation_kwargs)
    texts = None if tokenizer is None else tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    returned = len(token_ids) // len(ids)
    groups = [slice(begin, begin + returned) for begin in range(0, len(token_ids), returned)]
    return Generations(
        token_ids=[token_ids[group] for group in groups],
        texts=None if texts is None else [texts[group] for group in groups],
        output=output,
        report=report,
    )


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase | None", prompt: Prompt, index: int = 0, continues: bool = False
) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: needed for texts and messages.
        prompt: text, messages or ids.
        index: its number, for messages of errors.
        continues: it follows a prefix, so a text gets no special tokens.

    Raises:
        InvalidBatchError: an empty prompt, a text or messages without a tokenizer, messages that its chat template does
            not take or that follow a prefix, or something else.
    """
    ids: Any = prompt
    if isinstance(prompt, str) or (not _is_item(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise InvalidBatchError(f"prompt {index} is text, which needs a tokenizer; give one, or token ids.")
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=not continues)["input_ids"]
        elif continues:
            raise InvalidBatchError(
                f"prompt {index} is chat messages, whose template begins anew, and cannot follow a prefix; apply the "
                "template and give the token ids behind the prefix."
            )
        else:
            ids = _chat_ids(tokenizer, prompt, index)
    try:
        found = [index_of(token) for token in ids]
    except (TypeError, ValueError):
        raise InvalidBatchError(
            f"prompt {index} must be a text, a list of token ids or a list of chat messages, got {str(prompt)[:60]!r}."
        ) from None
    if not found:
        raise InvalidBatchError(f"prompt {index} is empty; generation needs at least one token to start from.")
    return found


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], index: int) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidBatchError(
            f"prompt {index} is chat messages, and the tokenizer has no chat template; set tokenizer.chat_template, or "
            "give texts."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template raises what it likes
        reason = str(error).strip().partition("\n")[0]
        raise InvalidBatchError(
            f"the tokenizer's chat template does not take the messages of prompt {index} ({reason}); give them the "
            "roles and fields that it expects."
        ) from error


def _is_item(value: Any) -> bool:
    """Whether a value is at most part of a prompt: a message, a token id."""
    return isinstance(value, Mapping) or not hasattr(value, "__len__") or getattr(value, "ndim", None) == 0


def _listed(prompts: Any) -> list[Any]:
    """The prompts, unless they are a single one."""
    listed = [] if isinstance(prompts, (str, bytes, Mapping)) else list(prompts)
    if isinstance(prompts, (str, bytes, Mapping)) or (listed and all(map(_is_item, listed))):
        raise InvalidBatchError(f"prompts is a list of prompts; write [prompt] for a single one, got {prompts!r:.60}.")
    if not listed:
        raise InvalidBatchError("there are no prompts; give at least one.")
    return listed


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and the mask of their tokens, both ``(B, L)`` int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
