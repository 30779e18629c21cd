"""Shrunken random models of every causal-LM type that transformers ships.

A model is shrunk from its configuration class by the *names* of the fields, so that a type that transformers adds
is usually covered without a line here. Layer patterns are kept: every kind of layer that the type's default
configuration contains occurs in the shrunken one. Windows, chunks, ranks and expert counts are small enough that
sequences of a few dozen tokens exercise them. The table `_OVERRIDES` holds what the names cannot tell.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = [
    "FIRST_ORDINARY_TOKEN",
    "NOT_STANDALONE",
    "VOCAB_SIZE",
    "WINDOW",
    "build",
    "model_types",
    "randomize_",
    "shrunken_config",
    "window_is_optional",
]

VOCAB_SIZE = 128
WINDOW = 24
FIRST_ORDINARY_TOKEN = 10
"""Ids below this are kept for padding, begin and end markers and image placeholders."""

_RULES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), value)
    for pattern, value in [
        (r"(unpadded_|decoder_|text_|pronunciation_|shape_)?vocab_size(_per_layer_input)?", VOCAB_SIZE),
        (r"encoder_hash_byte_group_vocab", 512),
        (r"(backbone_|attention_)?hidden_size(_global)?|(input_|output_)?embedding_size|encoder_cross_output_size", 64),
        (r"d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width", 64),
        (r"adapter_(in|out)_dim|adapter_input_size", 64),
        (r"hidden_size_per_layer_input|laurel_rank|(pronunciation|shape)_embed_dim", 16),
        (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|feed_forward_size|n_inner|d_inner|dff|dim_ff", 48),
        (r"n_heads?|(swa_)?num_(attention_)?heads|attention_heads|(num_)?(en|de)coder_attention_heads", 4),
        (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
        (r"(swa_|attention_)?head_dim|dim_head|d_head|attention_head_size|kv_channels", 16),
        (r"q_lora_rank", 24),
        (r"kv_lora_rank", 32),
        (r"o_lora_rank|qk_nope_head_dim|index_head_dim", 16),
        (r"qk_rope_head_dim|rotary_dim", 8),
        (r"index_topk", WINDOW),
        (r"v_head_dim", 12),
        # Scales and caps that are neutral by default get a value under which leaving them out shows.
        (r"(final_|output_)?logits?_soft_?cap(ping)?", 6.0),
        (r"attn_logit_softcapping", 3.0),
        (r"logits_scaling|lm_head_multiplier|embedding_multiplier|key_multiplier", 1.5),
        (r"residual_multiplier", 0.8),
        (r"attention_multiplier", 0.3),
        (r"dim_model_base", 32),
        (r"floor_scale", 8),
        (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
        (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|n_group|num_expert_group|index_n_heads", 2),
        (r"topk_group|n_shared_experts|(moe_)?num_shared_experts", 1),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
        (r"sliding_window(_size)?|(attention_)?window_size|local_attention(_window_len)?|attention_chunk_size", WINDOW),
        (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", 256),
        (r"(mamba_)?d_state|(mamba_|ssm_)?state_size", 8),
        (r"mamba_(n|num)_heads", 8),
        (r"linear_num_value_heads", 4),
        (r"n_mamba_heads|linear_num_(key_)?heads", 2),
        (r"linear_(key_|value_)?head_dim|mamba_head_?dim|mamba_d_head|(mamba_)?chunk_size", 16),
    ]
]
_RANDOMNESS = re.compile(r".*(dropout|pdrop|layerdrop|jitter_noise|jitter_eps).*")
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth"),
    *("decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers"),
)
_WINDOWS = ("sliding_window", "sliding_window_size")

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 32},
        **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12, "head_dim": 24},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 32, "num_kv_shared_layers": 2, "enable_moe_block": True},
    "gemma4_unified_text": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "gpt_neo": {
        **{"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"full_attn_idxs": [1], "layer_types": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "minimax_m3_vl_text": {
        **{"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
        **{"index_block_size": 4, "index_topk_blocks": 4},
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": WINDOW, "indexer_compress_ratio": 4},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}

_DRAFT_HEAD = "a draft head that reads the keys and values of another model, not a language model by itself"
NOT_STANDALONE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its language model is the type gemma3n_text",
    "gemma4_assistant": _DRAFT_HEAD,
    "gemma4_unified_assistant": _DRAFT_HEAD,
}
"""Types of the mapping that cannot be built or run by themselves, with the reason."""


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal language model, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunken_config(model_type: str, window: int | None = WINDOW) -> PreTrainedConfig:
    """A tiny configuration of `model_type` that keeps every kind of layer of the default configuration.

    Args:
        model_type: a key of transformers' causal-LM mapping.
        window: sliding window in tokens; `None` switches optional windows off and leaves chunks at their default
            length (see `window_is_optional`).

    Raises:
        ValueError: for a type in `NOT_STANDALONE`.
    """
    if model_type in NOT_STANDALONE:
        raise ValueError(f"model type {model_type!r} cannot be built by itself: {NOT_STANDALONE[model_type]}")
    return _shrink(CONFIG_MAPPING[model_type](), window)


def window_is_optional(model_type: str) -> bool:
    """Whether the type also occurs without the sliding window or attention chunks that its configuration names."""
    if model_type in NOT_STANDALONE:
        return False
    config = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    fields = vars(config)
    if "use_sliding_window" in fields:
        return not fields["use_sliding_window"]
    # Mistral's later checkpoints have no window; chunks matter only to rows longer than one.
    return (
        model_type == "mistral"
        or "attention_chunk_size" in fields
        or ("sliding_window" in fields and fields["sliding_window"] is None)
    )


def build(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, window: int | None = WINDOW
) -> PreTrainedModel:
    """A shrunken random model of `model_type` in evaluation mode, with weights under which attention matters.

    Args:
        model_type: a key of transformers' causal-LM mapping.
        dtype: of the parameters.
        seed: of the weights; the same seed gives the same weights.
        window: as in `shrunken_config`.
    """
    config = shrunken_config(model_type, window)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # The causal-LM class of a composite configuration may take one of its parts.
    parts = [getattr(config, key) for key in config.sub_configs]
    config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    # Grouped matrix products of experts exist for single precision and below only.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = model_class._from_config(config, dtype=dtype, **experts)
    for parameter in model.parameters():  # some types keep routers and norms in float32
        parameter.data = parameter.data.to(dtype)
    randomize_(model, seed)
    return model.eval()


def randomize_(model: nn.Module, seed: int = 0, gain: float = 1.2) -> None:
    """Redraw every parameter of `model` in place: the usual 0.02 makes attention almost uniform.

    Matrices get standard deviation `gain / sqrt(fan_in)`, embeddings 0.5; vectors keep their value (1 for norms,
    0 for biases) plus 0.1 of noise, so that no bias, sink or scale is left out of the comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if id(parameter) in embeddings:
                parameter.copy_(noise * 0.5)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * (gain / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(noise, alpha=0.1)


def _shrink(default: PreTrainedConfig, window: int | None) -> PreTrainedConfig:
    """`default` with every field that has a rule made small, built anew so that derived fields follow."""
    names = [field.name for field in dataclasses.fields(default)]
    # Read through __dict__: configurations with per-layer values refuse plain attribute access.
    values = {name: vars(default).get(name) for name in names}
    small: dict[str, Any] = {}
    for name in names:
        value = values[name]
        if name in default.sub_configs:
            if isinstance(value, PreTrainedConfig):
                small[name] = _shrink(value, window)
        elif _RANDOMNESS.fullmatch(name):
            if isinstance(value, int | float) and not isinstance(value, bool):
                small[name] = type(value)(0)
        elif name.endswith(("_token_id", "_token_index")):
            if isinstance(value, int) and value >= FIRST_ORDINARY_TOKEN:
                small[name] = FIRST_ORDINARY_TOKEN - 1
        elif name not in _DEPTHS:
            rule = next((target for pattern, target in _RULES if pattern.fullmatch(name)), None)
            if rule is not None:
                small[name] = [rule] * len(value) if isinstance(value, list) else rule
    small.update(_depth(default, values, small, window))
    if "use_sliding_window" in values:
        small["use_sliding_window"] = window is not None
    small.update({name: window for name in _WINDOWS if name in values})
    if window is None and "attention_chunk_size" in values:
        small["attention_chunk_size"] = values["attention_chunk_size"]
    switches = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}
    small.update({name: value for name, value in switches.items() if name in values})
    rope = values.get("rope_parameters") or {}
    if "original_max_position_embeddings" in rope:  # beyond it some types scale their queries by position
        small["rope_parameters"] = {**rope, "original_max_position_embeddings": WINDOW}
    if "kv_lora_rank" in values and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if values.get("qk_rope_head_dim") is not None and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    small.update(_OVERRIDES.get(default.model_type, {}))
    return type(default)(**small)


def _depth(
    default: PreTrainedConfig, values: dict[str, Any], small: dict[str, Any], window: int | None
) -> dict[str, Any]:
    """Number of layers and every per-layer list: two layers, or four where kinds of layers alternate."""
    depths = [name for name in _DEPTHS if values.get(name) is not None]
    if not depths:
        return {}
    total = values[depths[0]]
    per_layer = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == total
        and name not in small
        # A list of layer numbers is not a list of one entry a layer.
        and list(value) != list(range(total))
    }
    kinds = set(per_layer.get("layer_types", []))
    for full, sliding in (("full_attention", "sliding_attention"), ("hybrid", "hybrid_sliding")):
        if window is not None and kinds == {full} and "sliding_window" in values and _mentions(default, sliding):
            per_layer["layer_types"] = [(sliding, full)[i % 2] for i in range(total)]
    chosen = _representative_layers(list(per_layer.values()))
    result: dict[str, Any] = {name: [value[i] for i in chosen] for name, value in per_layer.items()}
    result.update(dict.fromkeys(depths, len(chosen)))
    if "max_window_layers" in values:
        result["max_window_layers"] = len(chosen) // 2
    if values.get("num_kv_shared_layers"):
        result["num_kv_shared_layers"] = len(chosen) // 2
    return result


def _representative_layers(per_layer: list[list[Any]]) -> list[int]:
    """Indices of layers that together show every value of every per-layer list, cycled to four (two if all equal)."""
    if not per_layer:
        return [0, 1]
    rows = [tuple(map(str, row)) for row in zip(*per_layer, strict=True)]
    chosen: list[int] = []
    seen: set[tuple[int, str]] = set()
    for index, row in enumerate(rows):
        if not seen.issuperset(enumerate(row)):
            chosen.append(index)
            seen.update(enumerate(row))
    depth = 2 if len(chosen) == 1 else max(4, len(chosen))
    return [chosen[i % len(chosen)] for i in range(depth)]


def _mentions(config: PreTrainedConfig, kind: str) -> bool:
    """Whether the type's modelling code knows layers of this kind."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        return kind in inspect.getsource(importlib.import_module(name))
    except ModuleNotFoundError:  # types that reuse another type's modelling code
        return False
