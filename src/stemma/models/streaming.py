"""Streaming: the same scores and gradients in memory that does not grow with the number of branches.

The tree is walked from the root. A part is either a run of neighbouring subtrees under one parent that fit
``max_tokens`` together, or a single node whose subtrees do not. A node's keys and values are cut out of the graph and
handed to the parts below it as leaves; each part runs forward and backward and is forgotten, and its gradient with
respect to those leaves adds up. When all parts below a node are done, one backward through the node carries the sum on.
What stays in memory is the graph of one path from the root, and of one part.

:func:`backward` is the training call: the loss of each part's sequences is taken as they come, so every token runs
forward once and backward once. :func:`stemma.score` streams behind its ordinary interface by running the forward
without a graph first and once more in the backward, as activation checkpointing does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import UnsupportedModelError
from stemma.models.forward import Edges, ForwardSettings, plain_forward, tree_forward
from stemma.models.scoring import Mode, Scores, choose_mode, make_scores, plain_rows, score
from stemma.prefix.tree import PrefixTree

__all__ = ["Part", "backward", "partition", "streamed_scores"]

Context = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Part:
    """Packed tokens ``[begin, end)`` that run in one call, and the parts below them."""

    begin: int
    end: int
    sequences: np.ndarray
    """Sequences that end in this part."""
    below: list["Part"] = field(default_factory=list)


def partition(tree: PrefixTree, max_tokens: int, parent: int = -1) -> list[Part]:
    """Cut the subtrees below ``parent`` (-1: the root) into parts of at most ``max_tokens`` packed tokens.

    A node whose own run is longer than ``max_tokens`` makes a part of its own, longer than that.
    """
    parts: list[Part] = []
    run: list[int] = []

    def close() -> None:
        if run:
            ending = tree.order[tree.node_first[run[0]] : tree.node_last[run[-1]]]
            parts.append(Part(int(tree.node_start[run[0]]), int(tree.node_subtree_end[run[-1]]), ending))
            run.clear()

    for node in tree.children(parent):
        begin, end = int(tree.node_start[node]), int(tree.node_subtree_end[node])
        if run and end - tree.node_start[run[0]] > max_tokens:
            close()
        own_end = begin + int(tree.node_length[node])
        if end - begin <= max_tokens or own_end == end:
            run.append(node)
            continue
        close()
        first_below = int(tree.node_first[node + 1])
        ending = tree.order[tree.node_first[node] : first_below]
        parts.append(Part(begin, own_end, ending, partition(tree, max_tokens, node)))
    close()
    return parts


@dataclass(eq=False)
class _Result:
    """Edge scores of one part, cut out of its graph: whoever uses them leaves gradients in ``.grad``."""

    edges: slice
    logprobs: Tensor
    entropies: Tensor | None


def _walk(
    model: nn.Module,
    tree: PrefixTree,
    edges: Edges,
    settings: ForwardSettings,
    parts: list[Part],
    consume: Callable[[Part, list[_Result]], None],
    context: Context,
    path: list[_Result],
) -> None:
    """Forward each part, let ``consume`` use its scores, walk below it, then back-propagate through it."""
    for part in parts:
        logprobs, entropies, _, call = tree_forward(
            model, tree, edges, settings, begin=part.begin, end=part.end, context=context, capture=bool(part.below)
        )
        result = _Result(
            edges.between(part.begin, part.end),
            _leaf(logprobs),
            None if entropies is None else _leaf(entropies),
        )
        path.append(result)
        consume(part, path)
        outputs: list[Tensor] = [logprobs] if entropies is None else [logprobs, entropies]
        leaves: list[Tensor] = [result.logprobs] if result.entropies is None else [result.logprobs, result.entropies]
        if part.below:
            if torch.is_grad_enabled() and call.hidden_graph:
                raise UnsupportedModelError(
                    "Streaming needs the graph of the prefix's keys and values, which reentrant activation "
                    "checkpointing hides: use gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            below: Context = {}
            for module, pair in call.captured.items():
                cut = (_leaf(pair[0]), _leaf(pair[1]))
                below[module] = cut
                outputs += pair
                leaves += cut
            _walk(model, tree, edges, settings, part.below, consume, below, path)
        path.pop()
        ends = zip(outputs, leaves, strict=True)
        used = [(out, leaf.grad) for out, leaf in ends if out.requires_grad and leaf.grad is not None]
        if used:
            torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor cut out of its graph; it collects a gradient where the graph would."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def backward(
    model: nn.Module,
    tree: PrefixTree,
    loss: Callable[[Scores], Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    aux_loss: bool = False,
    max_tokens: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Scores]:
    """Score, take a loss and back-propagate it into ``.grad``, streaming when the tree exceeds ``max_tokens``.

    Args:
        model, tree, temperature, entropy, aux_loss, max_tokens, mode: as in :func:`stemma.score`.
        loss: maps scores to a scalar. When streaming it is called with the scores of some sequences at a time, so it
            must be a sum over sequences with denominators fixed beforehand; every sequence comes exactly once.

    Returns:
        The loss (summed over calls, detached) and the scores of all sequences, detached.

    Raises:
        UnsupportedModelError, InvalidBatchError: as in :func:`stemma.score`.
        ValueError: the loss is not a scalar tensor.
    """
    settings = ForwardSettings(temperature, entropy, aux_loss)
    chosen = choose_mode(model, tree, mode, max_tokens)
    if chosen == "shared" or (chosen == "plain" and max_tokens is None):
        scores = score(
            model,
            tree,
            temperature=temperature,
            entropy=entropy,
            aux_loss=aux_loss,
            mode="plain" if chosen == "plain" else "shared",
        )
        value = _scalar(loss(scores))
        value.backward()
        return value.detach(), _detached(scores)
    if aux_loss:
        raise ValueError("The auxiliary loss is not a sum over parts of a batch: raise max_tokens or drop aux_loss.")
    total: list[Tensor] = []
    if chosen == "plain":
        return _plain_backward(model, tree, loss, settings, max_tokens)

    assert max_tokens is not None
    edges = Edges.of(tree)
    sequence_of_scored = np.repeat(np.arange(tree.num_sequences), tree.lengths)[tree.scored]
    kept = _EdgeBuffer(edges, settings)

    def consume(part: Part, path: list[_Result]) -> None:
        kept.store(path[-1])
        if part.sequences.size == 0:
            return
        scored = edges.of_scored[np.isin(sequence_of_scored, part.sequences)]
        # Edges of the path stand one part behind the other; find each scored edge in that row.
        starts = np.array([result.edges.start for result in path])
        sizes = np.array([result.edges.stop - result.edges.start for result in path])
        owner = np.searchsorted(starts, scored, side="right") - 1
        index = torch.from_numpy(scored - starts[owner] + (np.cumsum(sizes) - sizes)[owner])
        logprobs = torch.cat([result.logprobs for result in path])
        entropies = torch.cat([r.entropies for r in path if r.entropies is not None]) if settings.entropy else None
        index = index.to(logprobs.device)
        scores = make_scores(
            tree,
            logprobs[index],
            None if entropies is None else entropies[index],
            sequences=part.sequences,
            forwarded_tokens=part.end - part.begin,
            mode="streamed",
        )
        value = _scalar(loss(scores))
        if scores.logprobs.requires_grad:  # not so for sequences without a scored token
            value.backward()
        total.append(value.detach())

    _walk(model, tree, edges, settings, partition(tree, max_tokens), consume, {}, [])
    return torch.stack(total).sum(), kept.scores(tree)


def _plain_backward(
    model: nn.Module,
    tree: PrefixTree,
    loss: Callable[[Scores], Tensor],
    settings: ForwardSettings,
    max_tokens: int | None,
) -> tuple[Tensor, Scores]:
    total, logprobs, entropies, forwarded = [], [], [], 0
    for row in plain_rows(tree, max_tokens):
        part_logprobs, part_entropies, _, tokens = plain_forward(model, tree, row, settings)
        value = _scalar(
            loss(make_scores(tree, part_logprobs, part_entropies, sequences=row, forwarded_tokens=tokens, mode="plain"))
        )
        value.backward()
        total.append(value.detach())
        logprobs.append(part_logprobs.detach())
        entropies += [] if part_entropies is None else [part_entropies.detach()]
        forwarded += tokens
    scores = make_scores(
        tree,
        torch.cat(logprobs),
        torch.cat(entropies) if settings.entropy else None,
        forwarded_tokens=forwarded,
        mode="plain",
    )
    return torch.stack(total).sum(), scores


def streamed_scores(model: nn.Module, tree: PrefixTree, settings: ForwardSettings, max_tokens: int) -> Scores:
    """Scores of a tree over the budget, with a backward that streams again."""
    if settings.aux_loss:
        raise ValueError("The auxiliary loss is not a sum over parts of a batch: raise max_tokens or drop aux_loss.")
    edges = Edges.of(tree)
    parts = partition(tree, max_tokens)
    kept = _EdgeBuffer(edges, settings)
    with torch.no_grad():
        _walk(model, tree, edges, settings, parts, lambda _, path: kept.store(path[-1]), {}, [])
    logprobs, entropies = kept.values()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        # Autograd runs the replay only for a result that depends on something with a gradient.
        anchor = torch.zeros((), device=logprobs.device, requires_grad=True)
        device = logprobs.device.type
        dtype, autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def replay(grad_logprobs: Tensor, grad_entropies: Tensor | None) -> None:
            def consume(_: Part, path: list[_Result]) -> None:
                result = path[-1]
                result.logprobs.grad = grad_logprobs[result.edges]
                if result.entropies is not None and grad_entropies is not None:
                    result.entropies.grad = grad_entropies[result.edges]

            # The backward runs outside the caller's autocast; the second forward must be the first one again.
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=autocast):
                _walk(model, tree, edges, settings, parts, consume, {}, [])

        logprobs, replayed = _Replay.apply(anchor, logprobs, entropies, replay)
        entropies = replayed if settings.entropy else None
    index = torch.from_numpy(edges.of_scored).to(logprobs.device)
    return make_scores(
        tree,
        logprobs[index],
        None if entropies is None else entropies[index],
        forwarded_tokens=tree.unique_tokens,
        mode="streamed",
    )


class _Replay(torch.autograd.Function):
    """Values that were computed without a graph; their gradient is handed to a function that streams the backward."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, logprobs: Tensor, entropies: Tensor | None, replay: Callable[..., None]
    ) -> tuple[Tensor, Tensor]:
        ctx.replay = replay
        ctx.entropy = entropies is not None
        return logprobs.clone(), (entropies.clone() if entropies is not None else logprobs.new_zeros(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[None, ...]:
        ctx.replay(grad_logprobs, grad_entropies if ctx.entropy else None)
        return None, None, None, None


class _EdgeBuffer:
    """Edge scores of all parts, detached, in one row."""

    def __init__(self, edges: Edges, settings: ForwardSettings) -> None:
        self.edges, self.settings = edges, settings
        self.parts: list[_Result] = []

    def store(self, result: _Result) -> None:
        entropies = None if result.entropies is None else result.entropies.detach()
        self.parts.append(_Result(result.edges, result.logprobs.detach(), entropies))

    def values(self) -> tuple[Tensor, Tensor | None]:
        ordered = sorted(self.parts, key=lambda result: result.edges.start)
        logprobs = torch.cat([result.logprobs for result in ordered])
        return logprobs, (
            torch.cat([r.entropies for r in ordered if r.entropies is not None]) if self.settings.entropy else None
        )

    def scores(self, tree: PrefixTree) -> Scores:
        logprobs, entropies = self.values()
        index = torch.from_numpy(self.edges.of_scored).to(logprobs.device)
        return make_scores(
            tree,
            logprobs[index],
            None if entropies is None else entropies[index],
            forwarded_tokens=tree.unique_tokens,
            mode="streamed",
        )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"The loss must be a scalar tensor, got {type(value).__name__}: compute it from scores.logprobs, without "
            "item() or float()."
        )
    if value.dim():
        raise ValueError(f"The loss must be a scalar, got shape {tuple(value.shape)}.")
    return value


def _detached(scores: Scores) -> Scores:
    from dataclasses import replace

    return replace(
        scores,
        logprobs=scores.logprobs.detach(),
        entropies=None if scores.entropies is None else scores.entropies.detach(),
        aux_loss=None if scores.aux_loss is None else scores.aux_loss.detach(),
    )
