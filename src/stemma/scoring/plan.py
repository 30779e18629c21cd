"""The planner: shared, streamed or plain, and why.

The estimate is the FLOPs ratio of a padded batch to the tree. Below `WORTH_IT` the tree's extra kernel calls
would eat the gain, so the plain forward runs. A tree over the token budget is streamed.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from stemma.models.adapter import base_model, is_enabled
from stemma.models.limits import check_batch, dynamic_rope_limit, model_shape
from stemma.models.support import refuse_by_structure, refuse_meta
from stemma.prefix.economy import Economy, economy
from stemma.prefix.parts import partition, plain_rows, walk
from stemma.prefix.tree import PrefixTree
from stemma.scoring.refusals import check_model, check_streaming

__all__ = ["Mode", "Plan", "choose_mode", "explain"]

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
    """Plan a batch without running it. Only shapes, modules and the config of `model` are read, so a meta-device
    model will do.

    Where no self-test of `stemma.enable` has run, a model that config and modules show to be unfit is refused; for
    others `reasons` ends with the reminder that exactness is not checked here.

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    tree = stemma.PrefixTree.from_groups([list(range(200))], [[[1] * 20, [2] * 20, [3] * 20]])
    plan = stemma.explain(tiny_model("llama"), tree)
    print(plan.mode, f"{plan.token_ratio:.2f} times fewer tokens, at most {plan.flops_ratio:.2f} times faster")
    # prints: shared 2.54 times fewer tokens, at most 2.45 times faster
    ```

    Args:
        model: a causal language model of transformers.
        tree: the sequences.
        max_tokens: most tokens in one forward call, or None for no limit.

    Raises:
        UnsupportedModelError: the model cannot run over a tree.
        ValueError: `max_tokens` below 1.
    """
    _check_budget(max_tokens)
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
            parts = len(plain_rows(tree, max_tokens))
    else:
        mode = "shared"
        reasons = [
            f"{cost.padded_tokens / cost.unique_tokens:.2f} times fewer tokens are encoded than in a padded batch"
            + (f" ({cost.token_ratio:.2f} without its padding)" if cost.padded_tokens > cost.total_tokens else "")
            + f"; FLOPs bound the speed-up at {cost.flops_ratio:.2f}."
        ]
        if max_tokens is not None and _exceeds(tree, max_tokens):
            mode = "streamed"
            parts = sum(enters for _, enters in walk(partition(tree, max_tokens)))
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


def _check_budget(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")


def _exceeds(tree: PrefixTree, max_tokens: int | None) -> bool:
    return max_tokens is not None and tree.unique_tokens > max_tokens


Mode = Literal["auto", "shared", "plain"]


def choose_mode(model: nn.Module, tree: PrefixTree, mode: Mode, max_tokens: int | None) -> str:
    """ "shared", "streamed" or "plain" for a call of `score`, after refusing what cannot be computed."""
    if mode not in ("auto", "shared", "plain"):
        raise ValueError(f"mode must be 'auto', 'shared' or 'plain', got {mode!r}.")
    _check_budget(max_tokens)
    check_batch(model, tree)
    if mode == "plain":
        refuse_meta(model)
        return "plain"
    check_model(model)
    if mode == "auto" and economy(tree, model_shape(base_model(model))).flops_ratio < WORTH_IT:
        return "plain"
    if not _exceeds(tree, max_tokens):
        return "shared"
    check_streaming(model, tree)
    return "streamed"
