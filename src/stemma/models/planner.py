"""The planner: shared, streamed or plain, and why.

The estimate is the FLOPs ratio of a padded batch to the tree. Below :data:`WORTH_IT` the tree's extra kernel calls
would eat the gain, so the plain forward runs. A tree over the token budget is streamed.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from stemma.models.adapter import base_model, is_enabled, refuse_by_structure
from stemma.models.forward import dynamic_rope_limit
from stemma.prefix.economy import Economy, ModelShape, economy
from stemma.prefix.tree import PrefixTree

__all__ = ["WORTH_IT", "Plan", "explain", "model_shape"]

WORTH_IT = 1.05
"""Smallest FLOPs ratio at which sharing is planned."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a batch will run."""

    mode: str
    """"shared", "streamed" or "plain"."""
    reasons: tuple[str, ...]
    """Why, one sentence each."""
    parts: int
    """Forward calls; for a plain batch under a token budget, micro-batches."""
    num_sequences: int
    """Sequences of the tree."""
    num_nodes: int
    """Nodes of the tree."""
    depth: int
    """Levels of the tree."""
    economy: Economy
    """Tokens, pairs, FLOPs and bytes."""

    @property
    def token_ratio(self) -> float:
        """Total over unique tokens."""
        return self.economy.token_ratio

    @property
    def flops_ratio(self) -> float:
        """Upper bound of the speed-up over a padded batch."""
        return self.economy.flops_ratio

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self) | {"token_ratio": self.token_ratio, "flops_ratio": self.flops_ratio}

    def __str__(self) -> str:
        cost = self.economy
        rows = [
            ("tokens encoded, padding too", cost.padded_tokens, cost.unique_tokens),
            ("attention pairs, without it", cost.plain_pairs, cost.shared_pairs),
            ("positions through the head", cost.plain_scored, cost.shared_scored),
            ("forward GFLOPs", cost.plain_flops / 1e9, cost.shared_flops / 1e9),
            ("key/value MiB", cost.plain_key_value_bytes / 2**20, cost.shared_key_value_bytes / 2**20),
        ]
        lines = [
            f"{self.mode}: {self.num_sequences} sequences, {self.num_nodes} nodes on {self.depth} levels, "
            f"{self.parts} forward call{'s' if self.parts != 1 else ''}",
            *(f"  {reason}" for reason in self.reasons),
            f"  {'':28}{'padded':>14}{'shared':>14}{'ratio':>8}",
        ]
        for name, plain, shared in rows:
            form = ",.4g" if isinstance(plain, float) else ",d"
            lines.append(f"  {name:28}{plain:>14{form}}{shared:>14{form}}{plain / max(shared, 1e-12):>8.2f}")
        return "\n".join(lines)


def explain(model: nn.Module, tree: PrefixTree, *, max_tokens: int | None = None) -> Plan:
    """Plan a batch without running it. Only shapes, modules and the config of ``model`` are read, so a meta-device
    model will do.

    Where no self-test of :func:`stemma.enable` has run, a model that config and modules show to be unfit is refused;
    for others ``reasons`` ends with the reminder that exactness is not checked here.

    Args:
        model: a causal language model of transformers.
        tree: the sequences.
        max_tokens: most tokens in one forward call, or None for no limit.

    Raises:
        UnsupportedModelError: the model cannot run over a tree.
        ValueError: ``max_tokens`` below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    inner = base_model(model)
    tested = is_enabled(model) and not any(parameter.is_meta for parameter in inner.parameters())
    if not tested:
        refuse_by_structure(inner)
    cost = economy(tree, model_shape(inner))
    parts = 1
    if cost.flops_ratio < WORTH_IT:
        mode = "plain"
        reasons = [
            f"Sharing would save a factor of {cost.flops_ratio:.2f} in FLOPs, below {WORTH_IT}: each sequence runs "
            "alone."
        ]
        if max_tokens is not None:
            from stemma.models.scoring import plain_rows

            parts = len(plain_rows(tree, max_tokens))
    else:
        mode = "shared"
        reasons = [
            f"{cost.padded_tokens / cost.unique_tokens:.2f} times fewer tokens are encoded than in a padded batch"
            + (f" ({cost.token_ratio:.2f} without its padding)" if cost.padded_tokens > cost.total_tokens else "")
            + f"; FLOPs bound the speed-up at {cost.flops_ratio:.2f}."
        ]
        if max_tokens is not None and tree.unique_tokens > max_tokens:
            from stemma.models.streaming import partition

            mode = "streamed"
            parts = _count(partition(tree, max_tokens))
            rows, tokens = _split(tree, max_tokens)
            reasons.append(
                f"{tree.unique_tokens} tokens exceed max_tokens={max_tokens}, so the tree runs part by part. Split "
                f"into {rows} rows instead (PrefixTree.split) it would be {tokens} tokens, repeated paths counted."
            )
    limit = dynamic_rope_limit(model)
    if limit is not None and tree.lengths.min() <= limit < tree.max_length:
        reasons.append(
            f"The model's rotary frequencies depend on the longest sequence of a call beyond {limit} tokens: shorter "
            "sequences score as in a padded batch with the longer ones, not as alone."
        )
    if not tested:
        reasons.append("Support is not checked here: run `stemma check MODEL`, or stemma.check in Python.")
    return Plan(
        mode=mode,
        reasons=tuple(reasons),
        parts=parts,
        num_sequences=tree.num_sequences,
        num_nodes=tree.num_nodes,
        depth=tree.depth,
        economy=cost,
    )


def _split(tree: PrefixTree, max_tokens: int) -> tuple[int, int]:
    """Rows that the tree would be split into, and their tokens together, each row with the paths it repeats."""
    rank = np.empty(tree.num_sequences, dtype=np.int64)
    rank[tree.order] = np.arange(tree.num_sequences)
    rows = tree.split(max_tokens)
    tokens = 0
    for row in rows:
        low, high = rank[row].min(), rank[row].max() + 1
        tokens += int(tree.node_length[(tree.node_first < high) & (tree.node_last > low)].sum())
    return len(rows), tokens


def _count(parts: list[Any]) -> int:
    return sum(1 + _count(part.below) for part in parts)


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
        vocabulary=int(config.vocab_size),
        windows=tuple((window or None) if kind == "sliding_attention" else None for kind in types[:layers]),
        bytes_per_value=next(model.parameters()).element_size(),
    )
