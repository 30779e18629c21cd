"""One forward call of a model, over a tree or over padded rows, down to the log-probability of each scored token.

The language-model head is taken over for the length of a call (`stemma.scoring.head`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemma.errors import UnsupportedModelError
from stemma.models.adapter import (
    LAYOUT_ARGUMENT,
    TreeCall,
    base_model,
    input_device,
    model_label,
    tree_call,
    uncompiled,
)
from stemma.prefix.layout import Layout
from stemma.prefix.tree import PrefixTree
from stemma.scoring.head import Head

__all__ = ["ForwardSettings", "Targets", "check_calls", "plain_forward", "tree_forward"]


@dataclass(frozen=True)
class ForwardSettings:
    """What a caller of `score` wants from each forward."""

    temperature: float = 1.0
    entropy: bool = False
    aux_loss: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")


@dataclass(frozen=True, eq=False)
class Targets:
    """The distinct (path, next token) pairs of a tree that are scored, sorted by the position that predicts them."""

    predictor: np.ndarray
    """`(E,)` packed index of the predicting token, non-decreasing."""
    token: np.ndarray
    """`(E,)` predicted token id."""
    of_scored: np.ndarray
    """`(S,)`: the target of each scored token, sequence by sequence."""

    @classmethod
    def of(cls, tree: PrefixTree) -> "Targets":
        """The targets of a tree. A packed token stands for the target that leads to it."""
        targets = tree.scored_targets
        predictor = tree.previous[targets]
        order = np.argsort(predictor, kind="stable")
        target_of = np.zeros(tree.unique_tokens, dtype=np.int64)
        target_of[targets[order]] = np.arange(order.size)
        return cls(predictor[order], tree.packed_tokens[targets[order]], target_of[tree.path[tree.scored]])

    def gather(self, values: Tensor) -> Tensor:
        """`(S,)`: of values `(E,)` of the targets, that of each scored token."""
        return values[torch.from_numpy(self.of_scored).to(values.device)]

    def between(self, begin: int, end: int) -> slice:
        """The targets predicted by packed tokens `[begin, end)`."""
        return slice(*(int(cut) for cut in np.searchsorted(self.predictor, [begin, end])))


def tree_forward(
    model: nn.Module,
    tree: PrefixTree,
    targets: Targets,
    settings: ForwardSettings,
    *,
    begin: int = 0,
    end: int | None = None,
    context: dict[nn.Module, tuple[Tensor, Tensor]] | None = None,
    capture: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, TreeCall]:
    """Forward the packed tokens `[begin, end)` and score the targets they predict.

    Args:
        model: an enabled model.
        tree: the tree.
        targets: its targets.
        settings: temperature, entropies, auxiliary loss.
        begin: first packed token.
        end: behind the last one (default: all).
        context: for each attention module the keys and values of the path above.
        capture: keep keys and values for calls below.

    Returns:
        Log-probabilities `(E,)` of `targets.between(begin, end)`, entropies `(E,)` or None, the auxiliary loss or None,
        and the call with what was captured.

    Raises:
        UnsupportedModelError: a layer that does not attend as a tree needs, or a head that is not understood.
        NonFiniteError: the logits are NaN or infinite.
    """
    model, inner = uncompiled(model), base_model(model)
    layout = Layout.of(tree, begin, end)
    end = begin + layout.num_tokens
    device = input_device(model)
    part = targets.between(begin, end)
    predictors, target_position = np.unique(targets.predictor[part] - begin, return_inverse=True)
    column = torch.from_numpy(predictors)
    head = Head(inner, torch.zeros_like(column), column, (1, layout.num_tokens))
    call = TreeCall(layout, context or {}, capture)
    extra: dict[str, Any] = {"output_router_logits": True} if settings.aux_loss else {}
    multiplicity = torch.from_numpy(tree.multiplicity[begin:end])[None].to(device)
    with head.capture(), tree_call(call):
        output = model(
            input_ids=torch.from_numpy(layout.tokens)[None].to(device),
            # Weights of the router's auxiliary loss: how many sequences each token stands for. No mask is made of it.
            attention_mask=multiplicity,
            position_ids=torch.from_numpy(layout.positions)[None].to(device),
            use_cache=False,
            **{LAYOUT_ARGUMENT: call},
            **extra,
        )
    check_calls(model, call)
    logprobs, entropies = head.score(
        output.logits,
        torch.from_numpy(target_position.reshape(-1)),
        torch.from_numpy(targets.token[part]),
        temperature=settings.temperature,
        entropy=settings.entropy,
    )
    return logprobs, entropies, _aux_loss(inner, output, settings), call


def check_calls(model: nn.Module, call: TreeCall) -> None:
    """Refuse a model of which some layer did not ask for attention on the call.

    Raises:
        UnsupportedModelError: names the model and the number of layers.
    """
    inner = base_model(model)
    label = model_label(inner)
    layers = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    if call.calls == 0 or (isinstance(layers, int) and call.calls < layers):
        raise UnsupportedModelError(
            f"{label} has {layers} layers, but only {call.calls} of them asked for attention: the others mix tokens in "
            "another way (recurrence, convolution, linear attention), which cannot branch with a tree."
        )
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if call.by_keyword < call.calls and torch.is_grad_enabled() and recomputes:
        raise UnsupportedModelError(
            f"{label} does not pass keyword arguments on to its attention layers, so activation checkpointing would "
            "recompute them without the tree. Call model.gradient_checkpointing_disable()."
        )


def _aux_loss(model: PreTrainedModel, output: Any, settings: ForwardSettings) -> Tensor | None:
    if not settings.aux_loss:
        return None
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no auxiliary loss (output.aux_loss); ask for aux_loss only with a "
            "mixture-of-experts model that has one."
        )
    return loss


def plain_forward(
    model: nn.Module, tree: PrefixTree, sequences: np.ndarray, settings: ForwardSettings
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Forward whole sequences as a right-padded batch through the model's own attention, as one does without Stemma.

    Args:
        model: any causal language model; it need not be enabled.
        tree: the tree.
        sequences: `(n,)` indices of the sequences to run, in the order of the result.
        settings: temperature, entropies, auxiliary loss.

    Returns:
        Log-probabilities `(S,)` of the scored tokens, sequence by sequence, entropies `(S,)` or None, the auxiliary
        loss or None, and the number of tokens that went through the model, padding included.
    """
    model, inner = uncompiled(model), base_model(model)
    device = input_device(model)
    rows = [tree.sequence(int(i)) for i in sequences]
    width = max(row.size for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    row_of, column, tokens = [], [], []
    for index, (i, row) in enumerate(zip(sequences, rows, strict=True)):
        ids[index, : row.size] = row
        mask[index, : row.size] = 1
        wanted = np.flatnonzero(tree.scored[tree.offsets[i] : tree.offsets[i + 1]])
        row_of.append(np.full(wanted.size, index))
        column.append(wanted - 1)
        tokens.append(row[wanted])
    token = torch.from_numpy(np.concatenate(tokens))
    positions = torch.from_numpy(np.concatenate(row_of)), torch.from_numpy(np.concatenate(column))
    head = Head(inner, *positions, ids.shape)
    extra: dict[str, Any] = {"output_router_logits": True} if settings.aux_loss else {}
    # Padding on the right is never seen by the tokens before it, so only the router's statistics need the mask; without
    # one, fused attention takes its causal path.
    attention_mask = torch.from_numpy(mask).to(device) if settings.aux_loss else None
    with head.capture():
        output = model(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=attention_mask, use_cache=False, **extra
        )
    logprobs, entropies = head.score(
        output.logits,
        torch.arange(token.numel()),
        token,
        temperature=settings.temperature,
        entropy=settings.entropy,
    )
    return logprobs, entropies, _aux_loss(inner, output, settings), ids.size
