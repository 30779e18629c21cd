"""Sizes, states and layers of the language model with prefix linear attention (`stemma.pretrain.jrt.model`).

Layers are a mixer and a SwiGLU block, each behind an RMSNorm. A mixer is a gated short convolution, linear attention
(causal, or with an encoder over the prefix) or softmax attention in a sliding window with rotary positions. All of them
keep a state whose size does not grow with the text.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from stemma.attention.linear import (
    LinearState,
    chunked_linear_attention,
    linear_state,
    recurrent_linear_attention,
)
from stemma.errors import UnsupportedModelError

__all__ = ["Layer", "PrefixLinearAttention", "PrefixLinearAttentionConfig", "PrefixLinearCache", "Tokens"]

_MIXERS = ("conv", "linear", "prefix_linear", "sliding")


class PrefixLinearAttentionConfig(PreTrainedConfig):
    """Sizes. The published 360M model: width 1024, 26 layers, 16 heads, feature_dim 16, prefix 1024 of 2048 tokens.

    `mixer_types` names each layer's mixer: "conv", "linear" (causal), "prefix_linear" or "sliding"; None for conv,
    prefix_linear, sliding. `prefix_length` is how many tokens of a row the encoder sees where a call does not say;
    `mlm_weight` that of the masked tokens' loss; `chunk_size` tokens of a chunk in training and prefill.
    """

    model_type = "prefix_linear_attention"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - Trainer adds a list to it

    vocab_size: int = 258
    hidden_size: int = 64
    intermediate_size: int = 128
    num_attention_heads: int = 4
    feature_dim: int = 8
    mixer_types: list[str] | None = None
    prefix_length: int = 1024
    mlm_weight: float = 0.25
    sliding_window: int = 256
    conv_kernel: int = 3
    conv_expand: int = 1
    chunk_size: int = 64
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixer_types = list(self.mixer_types or ("conv", "prefix_linear", "sliding"))
        unknown = [name for name in self.mixer_types if name not in _MIXERS]
        if unknown:
            raise ValueError(f"mixer_types must be among {', '.join(_MIXERS)}; got {unknown[0]!r}.")
        self.num_hidden_layers = len(self.mixer_types)
        at_least = {"prefix_length": 0, "conv_kernel": 2} | dict.fromkeys(
            ("num_attention_heads", "feature_dim", "sliding_window", "conv_expand", "chunk_size"), 1
        )
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of twice num_attention_heads ({self.num_attention_heads}), "
                f"got {self.hidden_size}."
            )
        kwargs.pop("num_hidden_layers", None)
        super().__post_init__(**kwargs)


class _LayerState(CacheLayerMixin):
    """Tensors of one layer by name, batch first, none of which grows without bound."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UnsupportedModelError("a recurrent state takes no keys and values; give the model its own cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.length = {}, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedModelError("a recurrent state cannot forget its last tokens; encode the shorter text again")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {name: x.index_select(0, indices.to(x.device)) for name, x in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.states.items()}


class PrefixLinearCache(Cache):
    """The states of all layers; their size does not depend on how much text was read."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_LayerState() for _ in range(num_layers)])

    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.states.values())


class Tokens(NamedTuple):
    """The tokens of this call."""

    mask: Tensor
    """`(batch, T)` bool, False at padding."""
    prefix: Tensor
    """`(batch, T)` bool, which of them the encoder sees; none in a call that goes on from a cache."""


class _ShortConvolution(nn.Module):
    def __init__(self, config: PrefixLinearAttentionConfig) -> None:
        super().__init__()
        size = config.conv_expand * config.hidden_size
        self.input = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.kernel = nn.Conv1d(size, size, config.conv_kernel, groups=size, bias=False)
        self.output = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, states: dict[str, Tensor]) -> Tensor:
        gate, inputs = self.input(x).chunk(2, dim=-1)
        inputs = inputs.masked_fill(~tokens.mask[..., None], 0.0).transpose(1, 2)
        kept = self.kernel.kernel_size[0] - 1
        before = states.get("inputs")
        inputs = F.pad(inputs, (kept, 0)) if before is None else torch.cat([before.to(inputs), inputs], dim=-1)
        states["inputs"] = inputs[..., -kept:]
        output: Tensor = self.output(F.silu(gate) * self.kernel(inputs).transpose(1, 2))
        return output


class PrefixLinearAttention(nn.Module):
    """Linear attention (`stemma.attention.linear`) with its projections.

    Args:
        config: sizes.
        encoder: with keys and values of its own for the prefix; False is causal linear attention.
    """

    def __init__(self, config: PrefixLinearAttentionConfig, *, encoder: bool = True) -> None:
        super().__init__()
        self.heads, self.chunk_size = config.num_attention_heads, config.chunk_size
        hidden, features = config.hidden_size, config.num_attention_heads * config.feature_dim
        self.query, self.key = (nn.Linear(hidden, features, bias=False) for _ in range(2))
        self.value, self.output = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.encoder_key = nn.Linear(hidden, features, bias=False) if encoder else None
        self.encoder_value = nn.Linear(hidden, hidden, bias=False) if encoder else None

    def forward(self, x: Tensor, tokens: Tokens, states: dict[str, Tensor]) -> Tensor:
        q, k, v = (_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):  # sums stay in float32
            state = None
            if states:
                state = LinearState(states["value"], states["key"])
            elif self.encoder_key is not None and self.encoder_value is not None:
                e, u = (_heads(layer(x), self.heads) for layer in (self.encoder_key, self.encoder_value))
                state = linear_state(e, u, tokens.prefix)
            if x.shape[1] == 1:
                y, state = recurrent_linear_attention(q, k, v, state, mask=tokens.mask)
            else:
                y, state = chunked_linear_attention(q, k, v, state, mask=tokens.mask, chunk_size=self.chunk_size)
        states["value"], states["key"] = state
        output: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return output


class _SlidingAttention(nn.Module):
    def __init__(self, config: PrefixLinearAttentionConfig) -> None:
        super().__init__()
        self.heads, self.window, self.theta = config.num_attention_heads, config.sliding_window, config.rope_theta
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, tokens: Tokens, states: dict[str, Tensor]) -> Tensor:
        q, k, v = (_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        counts = tokens.mask.cumsum(dim=1)
        if states:
            counts = counts + states["count"][:, None]
        q, k = (_rotated(y, counts, self.theta) for y in (q, k))
        visible, length = tokens.mask, x.shape[1]
        if states:
            k, v = (torch.cat([states[name].to(y), y], dim=-2) for name, y in (("key", k), ("value", v)))
            visible = torch.cat([states["visible"], visible], dim=1)
        columns = torch.arange(visible.shape[1], device=x.device)
        distance = columns[-length:, None] - columns
        allowed = visible[:, None, :] & (distance >= 0) & (distance < self.window) | (distance == 0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        kept = slice(max(visible.shape[1] - self.window + 1, 0), None)
        states |= {"key": k[..., kept, :], "value": v[..., kept, :], "visible": visible[:, kept]}
        states["count"] = counts[:, -1]
        output: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return output


class Layer(nn.Module):
    """A mixer (by its name) and a SwiGLU block, each added to its input."""

    def __init__(self, config: PrefixLinearAttentionConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm, self.feed_norm = (nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.mixer: nn.Module
        if mixer == "conv":
            self.mixer = _ShortConvolution(config)
        elif mixer == "sliding":
            self.mixer = _SlidingAttention(config)
        else:
            self.mixer = PrefixLinearAttention(config, encoder=mixer == "prefix_linear")
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, states: dict[str, Tensor] | None = None) -> Tensor:
        states = {} if states is None else states  # without a cache they are read by nobody, also when recomputed
        x = x + self.mixer(self.mixer_norm(x), tokens, states)
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, dim=-1)
        y: Tensor = x + self.down(F.silu(gate) * up)
        return y


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions, halves of a head paired; `x (batch, heads, T, D)`, `positions (batch, T)`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=wide, device=x.device) / half)
    angles = (positions.to(wide)[..., None] * frequencies)[:, None]
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
