"""Small models and tokenizers made in code: nothing is downloaded, everything is an ordinary Hugging Face object.

Tests, demonstrations and the embedded training task build what they need here. Each object survives
`save_pretrained` followed by `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from stemma.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["byte_tokenizer", "tiny_config", "tiny_model", "train_tokenizer"]

EOS_TOKEN = "<eos>"
PAD_TOKEN = "<pad>"


def tiny_config(
    model_type: str = "llama",
    *,
    vocab_size: int = 258,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 512,
    **overrides: Any,
) -> PreTrainedConfig:
    """A small configuration of any decoder type that transformers knows.

    The named sizes are translated to the names the type uses (GPT-2 says `n_embd`), the size of a head follows from
    `hidden_size / num_attention_heads`, every dropout rate is 0 and the special token ids are unset, because the
    defaults of a published checkpoint (id 50256, dropout 0.1, heads of 128) do not fit a small model. `overrides`
    are set last, under the type's own names.

    Args:
        model_type: a key of transformers' configuration mapping, such as `llama`, `qwen3`, `gpt2` or `mixtral`.
        num_key_value_heads: key/value heads of grouped-query attention; None means one per query head.
        intermediate_size: width of the feed-forward layers; None means `4 * hidden_size`.
        overrides: further fields of the type's configuration.

    Raises:
        UnsupportedModelError: transformers has no such type, or the type lacks one of the sizes.
        ValueError: an override is not a field of the type, or the sizes do not divide.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is unknown to the installed transformers; pass one it ships, such as 'llama'"
        )
    if hidden_size % num_attention_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}")
    config_class = CONFIG_MAPPING[model_type]
    own_fields = {field.name for field in fields(config_class)}
    renamed: dict[str, str] = dict(config_class.attribute_map)
    unknown = sorted(set(overrides) - own_fields - set(renamed))
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}; check the name of the override")

    values: dict[str, Any] = {name: 0.0 for name in own_fields if _is_dropout(name)}
    values.update({name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in own_fields})
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }
    missing = sorted(set(sizes) - own_fields - set(renamed))
    if missing:
        raise UnsupportedModelError(
            f"{config_class.__name__} has no {missing[0]!r}; build such a configuration directly, or name the type of "
            "its text part (for example 'gemma3_text')"
        )
    values.update(sizes)
    if "max_position_embeddings" in own_fields | set(renamed):
        values["max_position_embeddings"] = max_position_embeddings
    feed_forward = 4 * hidden_size if intermediate_size is None else intermediate_size
    for name in ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim"):
        if name in own_fields:
            values[name] = feed_forward
    if "head_dim" in own_fields:
        values["head_dim"] = hidden_size // num_attention_heads
    if "num_key_value_heads" in own_fields:
        values["num_key_value_heads"] = num_key_value_heads or num_attention_heads
    elif num_key_value_heads not in (None, num_attention_heads):
        raise UnsupportedModelError(
            f"{model_type} has one key/value head per query head; got num_key_value_heads={num_key_value_heads} "
            f"with num_attention_heads={num_attention_heads}"
        )
    values.update(overrides)
    # The constructor only knows a type's own names where the type renames the common ones.
    return config_class(**{renamed.get(name, name): value for name, value in values.items()})


def tiny_model(
    model_type: str = "llama",
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **config_options: Any,
) -> PreTrainedModel:
    """A randomly initialised causal language model, in evaluation mode.

    Args:
        dtype: floating-point type of the parameters; None means float32.
        seed: seed of the initialisation; the global random state of torch is left as it was.
        config_options: the arguments of `tiny_config`.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type, or see `tiny_config`.
        ValueError: see `tiny_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **config_options)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"transformers has no causal language model of type {model_type!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Initialising in float32 and casting afterwards makes one seed mean the same weights in every precision.
    return model.to(dtype or torch.float32).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per UTF-8 byte (id = byte value), then `<eos>` (256) and `<pad>` (257).

    It needs no training text and decodes to exactly what was encoded. It adds no special tokens by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _as_fast(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with `<eos>` (id 0) and `<pad>` (id 1).

    Args:
        texts: the training text, one string at a time.
        vocab_size: upper bound of the vocabulary, special tokens included; a short text yields fewer tokens.

    Raises:
        ValueError: `vocab_size` cannot hold the 256 bytes and the two special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, eos, pad), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=_byte_symbols(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_fast(tokenizer)


def _as_fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _is_dropout(name: str) -> bool:
    return name.endswith(("dropout", "_pdrop", "layerdrop"))


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE uses for each of the 256 bytes, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
