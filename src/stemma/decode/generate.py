"""`stemma.generate`: transformers' `generate` with every shared run of tokens encoded, kept and read once."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index as index_of
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stemma.decode.options import Options
from stemma.decode.prompts import Prompt, as_list, pad_left, prompt_ids, without_padding
from stemma.decode.shared_cache import SharedPrefixCache, SharingReport
from stemma.decode.shared_prefix import SharedPrefix
from stemma.errors import InvalidBatchError
from stemma.models.adapter import base_model, input_device, uncompiled
from stemma.models.limits import check_lengths
from stemma.models.support import refuse_adapters_of_rows
from stemma.models.tokens import as_id_list
from stemma.scoring.enable import while_enabled

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Config", "Generations", "Prompt", "generate", "prompt_ids"]


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
            try:
                number = 1 if value is None and name == "max_tokens" else index_of(value)
            except TypeError:
                raise ValueError(f"{name} must be a whole number, got {value!r}.") from None
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Generations:
    """What `generate` returns: for each of `B` prompts its `G` sequences."""

    token_ids: list[list[list[int]]]
    """New tokens, up to and including the one that ended the row."""
    texts: list[list[str]] | None
    """Their texts without special tokens; None without a tokenizer."""
    output: Any
    """What transformers' `generate` returned: `(B * G, length)` whole rows, padded on both sides, or an object with
    `return_dict_in_generate=True`."""
    report: SharingReport | None
    """What was shared; None with `share="never"`."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompts: Sequence[Prompt] | Tensor,
    *,
    max_new_tokens: int | None = None,
    prefix: SharedPrefix | None = None,
    sharing: Config | None = None,
    generation_config: "GenerationConfig | None" = None,
    **generation_kwargs: Any,
) -> Generations:
    """Generate with transformers' `generate`, with each shared run of tokens encoded, kept and read once.

    The tokens are those of `model.generate` on the same prompts, padded on the left, up to rounding of the logits:
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
        model: a causal language model of transformers. One that was not enabled (`stemma.enable`) is enabled for
            the length of the call, which costs its self-test each time.
        tokenizer: of the model; None for prompts of token ids, which then give no texts.
        prompts: `B` texts, lists of chat messages (with the tokenizer's template and its generation prompt) or lists
            of token ids; or a tensor of ids, whose padding on the left is told as transformers tells it (the pad token
            must not be one that ends rows).
        max_new_tokens: most new tokens of a row; None takes what the generation config says, in `max_new_tokens` or
            `max_length`, else transformers' default.
        prefix: what all prompts begin with, encoded before; prompts are then what follows it. Texts are tokenized by
            themselves, without special tokens; messages cannot follow a prefix.
        sharing: how prefixes are shared.
        generation_config: of transformers; what it leaves open is as in the model's own.
        generation_kwargs: any other option of `model.generate`: `num_return_sequences`, `num_beams`,
            `do_sample`, `temperature`, `logits_processor`, `stopping_criteria`, `stop_strings`, ...; None
            switches off what a config sets, the end-of-sequence token too.

    Raises:
        InvalidBatchError: no prompt, an empty one, one that is not in a list, ids that are no integers, or messages
            that the chat template does not take or that would follow a prefix. Unless `share="never"`: ids outside
            the vocabulary, more tokens (new ones included) than the model has positions, rotary frequencies that would
            change with the length, or a prefix of another model.
        UnsupportedModelError: unless `share="never"`: a layer of the model cannot share its keys and values, an
            active dropout, an adapter of peft that depends on the whole row (learned tokens, activated LoRA), or
            attention weights as output.
        ValueError: an option that the model does not take or that cannot be combined with shared prefixes, or one of
            sampling without `do_sample`.
    """
    if sharing is not None and not isinstance(sharing, Config):
        raise ValueError(f'sharing must be a Config, got {sharing!r}; write sharing=Config(share="always"), say.')
    if prefix is not None and not isinstance(prefix, SharedPrefix):
        raise InvalidBatchError(
            f"prefix must be a SharedPrefix, got {type(prefix).__name__}; make one with "
            "stemma.SharedPrefix.from_ids(model, ids)."
        )
    listed = as_list(prompts)
    sharing = sharing or Config()
    model = uncompiled(model)
    inner: PreTrainedModel = base_model(model)
    shared = sharing.share != "never"
    if max_new_tokens is not None:
        generation_kwargs = generation_kwargs | {"max_new_tokens": max_new_tokens}
    options = Options(inner, tokenizer, generation_config, generation_kwargs, shared=shared)
    config = options.config
    if isinstance(prompts, Tensor) and options.padding is not None:
        listed = without_padding(prompts, options.padding, as_id_list(config.eos_token_id))
    ids = [prompt_ids(tokenizer, prompt, index, prefix is not None) for index, prompt in enumerate(listed)]
    whole = ids if prefix is None else [[*prefix.ids.tolist(), *row] for row in ids]
    longest = max(map(len, whole))
    new = options.most_new_tokens(longest)
    if shared:
        refuse_adapters_of_rows(model)
        check_lengths(model, longest + new)
    rows = max(config.num_beams or 1, config.num_return_sequences or 1)
    device = input_device(inner)
    input_ids, mask = pad_left(whole, config.pad_token_id, device)
    arguments = options.arguments(new)
    report = None
    with while_enabled(model) if shared else nullcontext():
        if shared:
            cache = SharedPrefixCache.of(
                model,
                [row for row in ids for _ in range(rows)],
                prefix=prefix,
                room=new,
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
    token_ids = options.ends.cut(sequences, longest)
    texts = None if tokenizer is None else tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    returned = len(token_ids) // len(ids)
    groups = [slice(begin, begin + returned) for begin in range(0, len(token_ids), returned)]
    return Generations(
        token_ids=[token_ids[group] for group in groups],
        texts=None if texts is None else [texts[group] for group in groups],
        output=output,
        report=report,
    )
