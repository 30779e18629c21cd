"""Scores of a tree: log-probabilities of its scored tokens, sequence by sequence."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import Targets

__all__ = ["Scores", "make_scores", "scalar_loss", "tree_scores"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities of the scored tokens of some sequences, flat, sequence by sequence (`S` tokens)."""

    logprobs: Tensor
    """`(S,)` float32 (float64 for a float64 model): log-probability of each scored token given those before it."""
    entropies: Tensor | None
    """`(S,)` entropy in nats of the distribution that each scored token was drawn from, or None."""
    sequence: Tensor
    """`(S,)` int64: index of the sequence in the tree."""
    column: Tensor
    """`(S,)` int64: place in a padded result."""
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
        """`(num_sequences, num_columns)`: each value at its sequence and column, `fill` elsewhere."""
        values = self._values(which)
        matrix = values.new_full((self.num_sequences, self.num_columns), fill)
        return matrix.index_put((self.sequence, self.column), values)

    def ragged(self, which: Literal["logprobs", "entropies"] = "logprobs") -> list[Tensor]:
        """One tensor `(scored tokens,)` a sequence, empty for sequences that are not among these scores."""
        counts = torch.bincount(self.sequence.cpu(), minlength=self.num_sequences).tolist()
        return list(torch.split(self._values(which), counts))

    def _values(self, which: str) -> Tensor:
        values = {"logprobs": self.logprobs, "entropies": self.entropies}[which]
        if values is None:
            raise ValueError("these scores hold no entropies: ask for them with score(..., entropy=True).")
        return values


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
    """Scores of `sequences` (default: all) from values in flat order."""
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


def tree_scores(
    tree: PrefixTree,
    targets: Targets,
    logprobs: Tensor,
    entropies: Tensor | None,
    *,
    aux_loss: Tensor | None = None,
    mode: str,
) -> Scores:
    """Scores of all sequences from values `(E,)` of the tree's targets."""
    return make_scores(
        tree,
        targets.gather(logprobs),
        None if entropies is None else targets.gather(entropies),
        aux_loss=aux_loss,
        forwarded_tokens=tree.unique_tokens,
        mode=mode,
    )


def scalar_loss(value: Any) -> Tensor:
    """The loss that a caller's function returned.

    Raises:
        ValueError: it is not a scalar tensor.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the loss must be a scalar tensor, got {type(value).__name__}: compute it from scores.logprobs, without "
            "item() or float()."
        )
    if value.dim():
        raise ValueError(f"the loss must be a scalar, got shape {tuple(value.shape)}.")
    return value
