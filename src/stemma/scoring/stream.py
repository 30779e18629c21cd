"""Streaming: the same scores and gradients in memory that does not grow with the number of branches.

The tree is walked from the root. A part is either a run of neighbouring subtrees under one parent that fit
`max_tokens` together, or a single node whose subtrees do not. A node's keys and values are cut out of the graph and
handed to the parts below it as leaves; each part runs forward and backward and is forgotten, and its gradient with
respect to those leaves adds up. When all parts below a node are done, one backward through the node carries the sum on.
What stays in memory is the graph of one path from the root, and of one part.

`streamed_backward` is the training call: the loss of each part's sequences is taken as they come, so every token
runs forward once and backward once. `stemma.score` streams behind its ordinary interface by running the forward
without a graph first and once more in the backward, as activation checkpointing does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import StateChangedError, UnsupportedModelError
from stemma.models.fingerprint import active_adapters
from stemma.models.weights_state import weights_state
from stemma.prefix.parts import Part, partition, walk
from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import ForwardSettings, Targets, tree_forward
from stemma.scoring.scores import Scores, make_scores, scalar_loss, tree_scores

__all__ = ["streamed_backward", "streamed_scores"]

Context = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Result:
    """Scores of the targets of one part, cut out of its graph: whoever uses them leaves gradients in `.grad`."""

    targets: slice
    logprobs: Tensor
    entropies: Tensor | None


@dataclass(eq=False)
class _Frame:
    """A part that has run forward: what its backward starts from, and what the parts below it attend to."""

    outputs: list[Tensor]
    leaves: list[Tensor]
    below: Context


def _walk(
    model: nn.Module,
    tree: PrefixTree,
    targets: Targets,
    settings: ForwardSettings,
    parts: list[Part],
    consume: Callable[[Part, list[_Result]], None],
) -> None:
    """Forward each part, let `consume` use its scores, walk below it, then back-propagate through it."""
    state = _state(model)
    path: list[_Result] = []
    frames: list[_Frame] = []
    for part, enters in walk(parts):
        if enters:
            _refuse_changes(model, state)
            frame, result = _forward(model, tree, targets, settings, part, frames[-1].below if frames else {})
            frames.append(frame)
            path.append(result)
            consume(part, path)
            continue
        path.pop()
        _backward(frames.pop())


def _forward(
    model: nn.Module, tree: PrefixTree, targets: Targets, settings: ForwardSettings, part: Part, context: Context
) -> tuple[_Frame, _Result]:
    logprobs, entropies, _, call = tree_forward(
        model, tree, targets, settings, begin=part.begin, end=part.end, context=context, capture=bool(part.below)
    )
    result = _Result(
        targets.between(part.begin, part.end), _leaf(logprobs), None if entropies is None else _leaf(entropies)
    )
    frame = _Frame([logprobs], [result.logprobs], {})
    if entropies is not None and result.entropies is not None:
        frame.outputs.append(entropies)
        frame.leaves.append(result.entropies)
    if part.below:
        if torch.is_grad_enabled() and call.hidden_graph:
            raise UnsupportedModelError(
                "streaming needs the graph of the prefix's keys and values, which reentrant activation "
                "checkpointing hides: use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        for module, pair in call.captured.items():
            cut = frame.below[module] = (_leaf(pair[0]), _leaf(pair[1]))
            frame.outputs += pair
            frame.leaves += cut
    return frame, result


def _backward(frame: _Frame) -> None:
    ends = zip(frame.outputs, frame.leaves, strict=True)
    used = [(out, leaf.grad) for out, leaf in ends if out.requires_grad and leaf.grad is not None]
    if used:
        torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])


def _state(model: nn.Module) -> tuple[object, ...]:
    """What a second forward must find as the first one did."""
    return weights_state(model), active_adapters(model), tuple(module.training for module in model.modules())


def _refuse_changes(model: nn.Module, state: tuple[object, ...]) -> None:
    """As autograd refuses a backward through tensors that were written to."""
    now = _state(model)
    if now == state:
        return
    names = ("weights or buffers", "active adapters", "training mode")
    changed = [name for name, before, after in zip(names, state, now, strict=True) if before != after]
    raise StateChangedError(
        f"the model's {' and '.join(changed)} changed between the parts of a streamed forward and backward, so the "
        "gradients would belong to no model. Call backward() before the optimizer steps or an adapter is switched, or "
        "use stemma.backward, which does both in one call."
    )


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor cut out of its graph; it collects a gradient where the graph would."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def streamed_backward(
    model: nn.Module,
    tree: PrefixTree,
    loss: Callable[[Scores], Tensor],
    settings: ForwardSettings,
    max_tokens: int,
) -> tuple[Tensor, Scores]:
    """Gradients of a tree over the budget: the loss of each part's sequences is taken as they come.

    Arguments and result as of `stemma.backward`.
    """
    targets = Targets.of(tree)
    sequence_of_scored = np.repeat(np.arange(tree.num_sequences), tree.lengths)[tree.scored]
    kept, total = _TargetBuffer(), []

    def consume(part: Part, path: list[_Result]) -> None:
        kept.store(path[-1])
        if part.sequences.size == 0:
            return
        scored = targets.of_scored[np.isin(sequence_of_scored, part.sequences)]
        # Targets of the path stand one part behind the other; find each scored target in that row.
        starts = np.array([result.targets.start for result in path])
        sizes = np.array([result.targets.stop - result.targets.start for result in path])
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
        value = scalar_loss(loss(scores))
        value.backward()
        total.append(value.detach())

    _walk(model, tree, targets, settings, partition(tree, max_tokens), consume)
    return torch.stack(total).sum(), tree_scores(tree, targets, *kept.values(), mode="streamed")


def streamed_scores(model: nn.Module, tree: PrefixTree, settings: ForwardSettings, max_tokens: int) -> Scores:
    """Scores of a tree over the budget, with a backward that streams again."""
    if settings.aux_loss:
        raise ValueError("the auxiliary loss is not a sum over parts of a batch: raise max_tokens or drop aux_loss.")
    targets = Targets.of(tree)
    parts = partition(tree, max_tokens)
    kept = _TargetBuffer()
    with torch.no_grad():
        _walk(model, tree, targets, settings, parts, lambda _, path: kept.store(path[-1]))
    logprobs, entropies = kept.values()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        # Autograd runs the replay only for a result that depends on something with a gradient.
        anchor = torch.zeros((), device=logprobs.device, requires_grad=True)
        device = logprobs.device.type
        dtype, autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        state = _state(model)

        def replay(grad_logprobs: Tensor, grad_entropies: Tensor | None) -> None:
            def consume(_: Part, path: list[_Result]) -> None:
                result = path[-1]
                result.logprobs.grad = grad_logprobs[result.targets]
                if result.entropies is not None and grad_entropies is not None:
                    result.entropies.grad = grad_entropies[result.targets]

            _refuse_changes(model, state)
            # The backward runs outside the caller's autocast; the second forward must be the first one again.
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=autocast):
                _walk(model, tree, targets, settings, parts, consume)

        logprobs, replayed = _Replay.apply(anchor, logprobs, entropies, replay)
        entropies = replayed if settings.entropy else None
    return tree_scores(tree, targets, logprobs, entropies, mode="streamed")


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


class _TargetBuffer:
    """Scores of the targets of all parts, detached, in one row."""

    def __init__(self) -> None:
        self.parts: list[_Result] = []

    def store(self, result: _Result) -> None:
        entropies = None if result.entropies is None else result.entropies.detach()
        self.parts.append(_Result(result.targets, result.logprobs.detach(), entropies))

    def values(self) -> tuple[Tensor, Tensor | None]:
        ordered = sorted(self.parts, key=lambda result: result.targets.start)
        entropies = [result.entropies for result in ordered if result.entropies is not None]
        return torch.cat([result.logprobs for result in ordered]), torch.cat(entropies) if entropies else None
