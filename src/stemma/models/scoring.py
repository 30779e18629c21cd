"""Scoring: log-probabilities and entropies of every sequence of a prefix tree, each shared token encoded once.

``score`` gives a differentiable result. It runs the tree as one packed row when that fits ``max_tokens``, streams it
when it does not (:mod:`stemma.models.streaming`), and takes the plain forward where sharing does not pay
(:mod:`stemma.models.planner`).
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model
from stemma.models.forward import (
    Edges,
    ForwardSettings,
    check_batch,
    check_model,
    dynamic_rope_limit,
    plain_forward,
    tree_forward,
)
from stemma.prefix.tree import PrefixTree

__all__ = ["Mode", "Scores", "choose_mode", "score"]

Mode = Literal["auto", "shared", "plain"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities of the scored tokens of some sequences, flat, sequence by sequence (``S`` tokens)."""

    logprobs: Tensor
    """``(S,)`` float32 (float64 for a float64 model): log-probability of each scored token given those before it."""
    entropies: Tensor | None
    """``(S,)`` entropy in nats of the distribution that each scored token was drawn from, or None."""
    sequence: Tensor
    """``(S,)`` int64: index of the sequence in the tree."""
    column: Tensor
    """``(S,)`` int64: place in a padded result."""
    num_sequences: int
    """Sequences in the whole tree."""
    num_columns: int
    """Width of a padded result."""
    aux_loss: Tensor | None
    """The router's load-balancing loss over all sequences, shared tokens counted each time, or None."""
    forwarded_tokens: int
    """Tokens that went through the model, padding included."""
    mode: str
    """"shared", "streamed" or "plain"."""

    def padded(self, which: Literal["logprobs", "entropies"] = "logprobs", fill: float = 0.0) -> Tensor:
        """``(num_sequences, num_columns)``: each value at its sequence and column, ``fill`` elsewhere."""
        values = self._values(which)
        matrix = values.new_full((self.num_sequences, self.num_columns), fill)
        return matrix.index_put((self.sequence, self.column), values)

    def ragged(self, which: Literal["logprobs", "entropies"] = "logprobs") -> list[Tensor]:
        """One tensor ``(scored tokens,)`` a sequence, empty for sequences that are not among these scores."""
        counts = torch.bincount(self.sequence.cpu(), minlength=self.num_sequences).tolist()
        return list(torch.split(self._values(which), counts))

    def _values(self, which: str) -> Tensor:
        values = {"logprobs": self.logprobs, "entropies": self.entropies}[which]
        if values is None:
            raise ValueError("These scores hold no entropies: ask for them with score(..., entropy=True).")
        return values


def score(
    model: nn.Module,
    tree: PrefixTree,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    aux_loss: bool = False,
    max_tokens: int | None = None,
    mode: Mode = "auto",
) -> Scores:
    """Log-probabilities of the tree's scored tokens, the same as from each sequence alone, to rounding.

    Args:
        model: a causal language model of transformers on which :func:`stemma.enable` was called.
        tree: the sequences.
        temperature: logits are divided by it.
        entropy: give entropies too.
        aux_loss: give the auxiliary loss of a mixture-of-experts model too, exact for repeated prefixes.
        max_tokens: most tokens in one forward call. A larger tree is streamed: a few more passes over shared prefixes,
            memory independent of the number of branches. Streamed gradients arrive in ``.grad`` when the result is
            back-propagated with ``.backward()``; ``torch.autograd.grad`` is not served. :func:`stemma.backward` streams
            without computing the forward twice.
        mode: "auto" plans, "shared" always shares, "plain" runs each sequence alone in a padded batch.

    Returns:
        The scores, differentiable.

    Raises:
        UnsupportedModelError: a model or setting for which the result would not be exact.
        InvalidBatchError: token ids or lengths that the model does not have.
    """
    settings = ForwardSettings(temperature, entropy, aux_loss)
    chosen = choose_mode(model, tree, mode, max_tokens)
    if chosen == "plain":
        return plain_scores(model, tree, settings, max_tokens)
    if chosen == "streamed":
        from stemma.models.streaming import streamed_scores

        assert max_tokens is not None
        return streamed_scores(model, tree, settings, max_tokens)
    edges = Edges.of(tree)
    logprobs, entropies, aux, _ = tree_forward(model, tree, edges, settings)
    index = torch.from_numpy(edges.of_scored).to(logprobs.device)
    return make_scores(
        tree,
        logprobs[index],
        entropies[index] if entropies is not None else None,
        aux_loss=aux,
        forwarded_tokens=tree.unique_tokens,
        mode="shared",
    )


def choose_mode(model: nn.Module, tree: PrefixTree, mode: Mode, max_tokens: int | None) -> str:
    """ "shared", "streamed" or "plain" for a call of :func:`score`, after refusing what cannot be computed."""
    from stemma.models.planner import explain

    if mode not in ("auto", "shared", "plain"):
        raise ValueError(f"mode must be 'auto', 'shared' or 'plain', got {mode!r}.")
    check_batch(model, tree)
    inner = base_model(model)
    if mode == "plain" or (mode == "auto" and getattr(inner, "_stemma_fallback", False)):
        return "plain"
    check_model(model)
    plan = explain(model, tree, max_tokens=max_tokens)
    chosen = plan.mode
    if mode == "shared" and chosen == "plain":
        chosen = "streamed" if max_tokens is not None and tree.unique_tokens > max_tokens else "shared"
    if chosen == "streamed":
        _refuse_streaming(model, tree)
    if getattr(inner, "_stemma_verify", False) and chosen != "plain":
        inner._stemma_verify = False
        from stemma.models.verify import check

        report = check(model, tree, repeats=1)
        if not report.ok:
            inner._stemma_fallback = True
            warnings.warn(
                f"The shared forward of {type(inner).__name__} differs from the plain one on the first batch, so every "
                f"batch takes the plain forward from here on. {report.summary()}",
                stacklevel=3,
            )
            return "plain"
    return chosen


def _refuse_streaming(model: nn.Module, tree: PrefixTree) -> None:
    """Streaming runs forward and backward several times in one step, each rank as often as its own tree asks."""
    limit = dynamic_rope_limit(model)
    if limit is not None and tree.max_length > limit:
        raise UnsupportedModelError(
            f"The model's rotary frequencies change for calls that reach beyond {limit} tokens (dynamic or longrope "
            f"scaling), so the parts of a streamed tree of up to {tree.max_length} tokens would not fit together. "
            "Raise max_tokens until the tree fits one call."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "A streamed tree makes another number of forward calls on each rank, and a sharded model (FSDP, tensor "
            "parallel) needs the same number everywhere. Raise max_tokens, or give each rank fewer sequences."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.require_backward_grad_sync:
        raise UnsupportedModelError(
            "A streamed tree runs backward several times, and DistributedDataParallel would reduce gradients each "
            "time. Call it inside model.no_sync() and reduce the gradients afterwards, or raise max_tokens."
        )


def make_scores(
    tree: PrefixTree,
    logprobs: Tensor,
    entropies: Tensor | None,
    *,
    sequences: np.ndarray | None = None,
    aux_loss: Tensor | None = None,
    forwarded_tokens: int,
    mode: str,
) -> Scores:
    """Scores of ``sequences`` (default: all) from values in flat order."""
    sequence = np.repeat(np.arange(tree.num_sequences), tree.lengths)[tree.scored]
    column = tree.column[tree.scored]
    if sequences is not None:
        chosen = np.isin(sequence, sequences)
        sequence, column = sequence[chosen], column[chosen]
    return Scores(
        logprobs=logprobs,
        entropies=entropies,
        sequence=torch.from_numpy(sequence).to(logprobs.device),
        column=torch.from_numpy(column).to(logprobs.device),
        num_sequences=tree.num_sequences,
        num_columns=tree.num_columns,
        aux_loss=aux_loss,
        forwarded_tokens=forwarded_tokens,
        mode=mode,
    )


def plain_rows(tree: PrefixTree, max_tokens: int | None) -> list[np.ndarray]:
    """Sequences of each padded micro-batch of the plain forward, in order, at most ``max_tokens`` with padding."""
    if max_tokens is None:
        return [np.arange(tree.num_sequences)]
    rows: list[list[int]] = []
    width = 0
    for index, length in enumerate(tree.lengths):
        width = max(width, int(length))
        if not rows or width * (len(rows[-1]) + 1) > max_tokens:
            rows.append([])
            width = int(length)
        rows[-1].append(index)
    return [np.array(row) for row in rows]


def plain_scores(model: nn.Module, tree: PrefixTree, settings: ForwardSettings, max_tokens: int | None) -> Scores:
    """Scores of each sequence alone, in padded micro-batches."""
    rows = plain_rows(tree, max_tokens)
    if settings.aux_loss and len(rows) > 1:
        raise ValueError("The auxiliary loss is not a sum over micro-batches: raise max_tokens or drop aux_loss.")
    parts = [plain_forward(model, tree, row, settings) for row in rows]
    return make_scores(
        tree,
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts if part[1] is not None]) if settings.entropy else None,
        aux_loss=parts[0][2],
        forwarded_tokens=sum(part[3] for part in parts),
        mode="plain",
    )
