"""A small language model with prefix linear attention (JRT-RNN), as an ordinary transformers model, and its loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from stemma.attention.linear import prefix_mask
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.pretrain.jrt.layers import Layer, PrefixLinearAttentionConfig, PrefixLinearCache, Tokens

__all__ = ["PrefixLinearAttentionForCausalLM", "prefix_lm_loss"]

_WITH_A_CACHE = (
    "with a cache padding must be on the left, as states end where a row ends; pad there, or give use_cache=False"
)
_IN_GENERATE = (
    "generate goes on where a row ends, so that padding of prompts must be on the left: give the tokenizer "
    "padding_side='left', and an attention_mask where texts hold the id of padding"
)


class PrefixLinearAttentionForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. `generate` reads the prompt as the prefix unless `prefix_lengths` says otherwise."""

    config_class = PrefixLinearAttentionConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ("Layer",)
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - transformers reads it on the class

    def __init__(self, config: PrefixLinearAttentionConfig) -> None:
        super().__init__(config)
        assert config.mixer_types is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, mixer) for mixer in config.mixer_types)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.normal_(module.weight, mean=0.0, std=module.kernel_size[0] ** -0.5)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        past_key_values: PrefixLinearCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: `(batch, T)` int64; after a cached call the new tokens only.
            attention_mask: `(batch, T)`, or with the cached tokens in front; 0 at padding, which is at one end of a
                row (at the left with a cache); None: no padding.
            prefix_lengths: `(batch,)` int64, leading tokens (padding not counted) that the encoder sees; None: the
                configuration's `prefix_length`. Read in the first call only.
            past_key_values: what an earlier call returned.
            labels: `(batch, T)` int64, see `prefix_lm_loss`; a token behind padding, predicted from nothing,
                has no loss.
            use_cache: return the states; None: not in training, nor with labels.
            logits_to_keep: logits of so many last positions only; 0: of all.

        Raises:
            InvalidBatchError: shapes, lengths or padding that do not make a batch, or a label of the prefix whose token
                the input shows.
            UnsupportedModelError: a cache of another kind.
        """
        cache = _checked_cache(past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if cache is None and use_cache:
            cache = PrefixLinearCache(len(self.layers))
        mask = _checked_mask(input_ids, attention_mask, left=None if cache is None else _WITH_A_CACHE)
        prefix = torch.zeros_like(mask)
        if cache is None or not cache.get_seq_length():
            prefix = prefix_mask(_checked_lengths(input_ids, prefix_lengths, self.config.prefix_length), mask)
        if labels is not None:
            labels = _checked_labels(labels, input_ids, mask, prefix)
        tokens = Tokens(mask, prefix)
        x = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            states = None if cache is None else cache.layers[index].states
            if self.gradient_checkpointing and self.training and cache is None:
                x = self._gradient_checkpointing_func(layer.__call__, x, tokens, states)
            else:
                x = layer(x, tokens, states)
            if cache is not None:
                cache.layers[index].length += input_ids.shape[1]
        logits = self.lm_head(self.norm(x[:, -logits_to_keep:] if logits_to_keep else x))
        loss = None if labels is None else prefix_lm_loss(logits, labels, prefix, mlm_weight=self.config.mlm_weight)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        prefix_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; what it adds is never part of the prefix.

        Args:
            inputs: `(batch, T)` prompts, or give `input_ids`; padded on the left. Without an `attention_mask`, tokens
                with the id of padding are padding, unless this id ends texts too.
            generation_config: settings, in place of the model's own.
            prefix_lengths: `(batch,)`, see `forward`; longer than a prompt means all of it.

        Raises:
            InvalidBatchError, UnsupportedModelError: see `forward`; no prompts, or prompts without tokens.
        """
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(prompts, Tensor) or prompts.ndim != 2 or not prompts.numel():
            got = tuple(prompts.shape) if isinstance(prompts, Tensor) else type(prompts).__name__
            raise InvalidBatchError(
                f"generate needs `inputs` or `input_ids`, a tensor (batch, tokens) with at least one token, got {got}; "
                "to write from nothing, give the token that begins texts"
            )
        _checked_cache(kwargs.get("past_key_values"))
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._padding_of(prompts, generation_config, kwargs)
        lengths = _checked_lengths(prompts, prefix_lengths, self.config.prefix_length)
        mask = _checked_mask(prompts, kwargs["attention_mask"], left=_IN_GENERATE)
        lengths = torch.minimum(lengths, mask.sum(dim=1))
        return super().generate(inputs, generation_config, *args, prefix_lengths=lengths, **kwargs)

    def _padding_of(self, prompts: Tensor, given: GenerationConfig | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask that transformers infers from ids; None where it finds no padding, or cannot tell it from an end."""

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            value = getattr(given, name, None)
            return getattr(self.generation_config, name, None) if value is None else value

        pad, end = setting("pad_token_id"), setting("eos_token_id")
        if pad is None or (end is not None and int(pad) in torch.as_tensor(end).flatten().tolist()):
            return None
        mask = prompts != int(pad)
        return None if bool(mask.all()) else mask.long()


def prefix_lm_loss(logits: Tensor, labels: Tensor, prefix: Tensor, *, mlm_weight: float = 0.25) -> Tensor:
    """Mean over next tokens, plus `mlm_weight` times the mean over masked tokens; a mean of nothing is 0.

    Args:
        logits: `(batch, T, V)`.
        labels: `(batch, T)` int64, each at its own position as transformers has them; -100: no loss. A label of the
            prefix is a masked token, predicted where it stands; others are predicted one token before.
        prefix: `(batch, T)` bool.
        mlm_weight: see above.

    Returns:
        A float32 (float64 for such logits) scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ahead = labels[:, 1:].masked_fill(prefix[:, 1:], -100)
    return _mean_loss(logits[:, :-1], ahead) + mlm_weight * _mean_loss(logits, labels.masked_fill(~prefix, -100))


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def _checked_cache(cache: Any) -> PrefixLinearCache | None:
    if cache is None or isinstance(cache, PrefixLinearCache):
        return cache
    raise UnsupportedModelError(
        f"past_key_values is a {type(cache).__name__}, but this model keeps states, not keys and values; leave it out "
        "for a new cache, or give the PrefixLinearCache that an earlier call returned"
    )


def _checked_labels(labels: Tensor, input_ids: Tensor, mask: Tensor, prefix: Tensor) -> Tensor:
    """Labels, less those that would be predicted from padding."""
    if labels.shape != input_ids.shape:
        raise InvalidBatchError(
            f"labels must be one for each of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
        )
    shown = int((prefix & (labels == input_ids)).sum())
    if shown:
        raise InvalidBatchError(
            f"labels inside the prefix are masked tokens, but {shown} of them equal the token that the input shows, "
            "which would train copying; make batches with PrefixLMCollator, or set labels of the prefix to -100, or "
            "the input there to a mask token (prefix_lengths of 0: all labels are next tokens)"
        )
    behind_padding = ~mask.roll(1, dims=1)  # the first column, which this gets wrong, is predicted from nothing anyway
    return labels.masked_fill(behind_padding & ~prefix, -100)


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None, *, left: str | None) -> Tensor:
    """Which tokens are text; `left`: what to say where padding must be on the left and is not."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.ndim != 2 or attention_mask.shape[1] < input_ids.shape[1]:
        raise InvalidBatchError(
            f"attention_mask must be (batch, tokens) with a column for each of {input_ids.shape[1]} tokens, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -input_ids.shape[1] :].bool()
    if left and not bool(mask[:, -1].all()):
        raise InvalidBatchError(left)
    if bool((mask.diff(dim=1).sum(dim=1) > 1).any()) or not bool(mask.any(dim=1).all()):
        raise InvalidBatchError(
            "a row must be one run of at least one token, with padding at one end only; give such an attention_mask"
        )
    return mask


def _checked_lengths(input_ids: Tensor, lengths: Sequence[int] | Tensor | None, default: int) -> Tensor:
    if lengths is None:
        return torch.full((len(input_ids),), default, device=input_ids.device)
    lengths = torch.as_tensor(lengths, device=input_ids.device)
    if lengths.shape != input_ids.shape[:1] or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise InvalidBatchError(
            f"prefix_lengths must hold one whole number of at least 0 for each of {len(input_ids)} rows, "
            f"got shape {tuple(lengths.shape)} of {lengths.dtype}"
        )
    return lengths


AutoConfig.register(PrefixLinearAttentionConfig.model_type, PrefixLinearAttentionConfig, exist_ok=True)
AutoModelForCausalLM.register(PrefixLinearAttentionConfig, PrefixLinearAttentionForCausalLM, exist_ok=True)
