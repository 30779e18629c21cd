"""Scoring: log-probabilities and entropies of every sequence of a prefix tree, each shared token encoded once.

`score` gives a differentiable result. It runs the tree as one packed row when that fits `max_tokens`, streams it
when it does not (`stemma.scoring.stream`), and takes the plain forward where sharing does not pay
(`stemma.scoring.plan`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from stemma.prefix.parts import plain_rows
from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import ForwardSettings, Targets, plain_forward, tree_forward
from stemma.scoring.plan import Mode, choose_mode
from stemma.scoring.scores import Scores, make_scores, scalar_loss, tree_scores
from stemma.scoring.stream import streamed_backward, streamed_scores

__all__ = ["backward", "score"]


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

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    model = stemma.enable(tiny_model("llama"))
    tree = stemma.PrefixTree.from_groups([list(range(100))], [[[7, 8, 9], [7, 5]]])
    scores = stemma.score(model, tree)
    loss = -scores.padded().sum()  # (sequences, longest response), 0 behind a shorter response
    loss.backward()
    print(scores.padded().shape, scores.forwarded_tokens, "of", tree.total_tokens)
    # prints: torch.Size([2, 3]) 104 of 205
    ```

    Args:
        model: a causal language model of transformers on which `stemma.enable` was called.
        tree: the sequences.
        temperature: logits are divided by it.
        entropy: give entropies too.
        aux_loss: give the auxiliary loss of a mixture-of-experts model too, exact for repeated prefixes.
        max_tokens: most tokens in one forward call. A larger tree is streamed: a few more passes over shared prefixes,
            memory independent of the number of branches. Streamed gradients arrive in `.grad` when the result is
            back-propagated with `.backward()`; `torch.autograd.grad` is not served. `stemma.backward` streams without
            computing the forward twice.
        mode: "auto" plans, "shared" always shares, "plain" runs each sequence alone in a padded batch.

    Returns:
        The scores, differentiable.

    Raises:
        UnsupportedModelError: a model or setting for which the result would not be exact.
        InvalidBatchError: token ids or lengths that the model does not have.
        NonFiniteError: the model's logits are NaN or infinite.
        ValueError: `temperature` not above 0, `max_tokens` below 1, another mode, or `aux_loss` of a tree that does not
            fit one call.
    """
    settings = ForwardSettings(temperature, entropy, aux_loss)
    chosen = choose_mode(model, tree, mode, max_tokens)
    if chosen == "plain":
        return _plain_scores(model, tree, settings, max_tokens)
    if chosen == "streamed":
        assert max_tokens is not None
        return streamed_scores(model, tree, settings, max_tokens)
    return _shared_scores(model, tree, settings)


def _shared_scores(model: nn.Module, tree: PrefixTree, settings: ForwardSettings) -> Scores:
    targets = Targets.of(tree)
    logprobs, entropies, aux_loss, _ = tree_forward(model, tree, targets, settings)
    return tree_scores(tree, targets, logprobs, entropies, aux_loss=aux_loss, mode="shared")


def _plain_scores(model: nn.Module, tree: PrefixTree, settings: ForwardSettings, max_tokens: int | None) -> Scores:
    """Scores of each sequence alone, in padded micro-batches."""
    rows = plain_rows(tree, max_tokens)
    if settings.aux_loss and len(rows) > 1:
        raise ValueError("the auxiliary loss is not a sum over micro-batches: raise max_tokens or drop aux_loss.")
    parts = [plain_forward(model, tree, row, settings) for row in rows]
    return make_scores(
        tree,
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts if part[1] is not None]) if settings.entropy else None,
        aux_loss=parts[0][2],
        forwarded_tokens=sum(part[3] for part in parts),
        mode="plain",
    )


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
    """Score, take a loss and back-propagate it into `.grad`, streaming when the tree exceeds `max_tokens`.

    ```python
    import torch
    import stemma
    from stemma.models.tiny import tiny_model

    model = stemma.enable(tiny_model("llama"))
    tree = stemma.PrefixTree.from_groups([list(range(100))], [[[7, 8, 9], [7, 5]]])
    advantages = torch.tensor([1.0, -1.0])
    value, scores = stemma.backward(
        model, tree, lambda scores: -(scores.logprobs * advantages[scores.sequence]).sum() / 2, max_tokens=64
    )
    print(scores.mode, len(scores.logprobs))
    # prints: streamed 5
    ```

    Args:
        model, tree, temperature, entropy, aux_loss, max_tokens, mode: as in `stemma.score`.
        loss: maps scores to a scalar. When streaming it is called with the scores of some sequences at a time, so it
            must be a sum over sequences with denominators fixed beforehand; every sequence comes exactly once.

    Returns:
        The loss (summed over calls, detached) and the scores of all sequences, detached.

    Raises:
        UnsupportedModelError, InvalidBatchError, NonFiniteError: as in `stemma.score`.
        StateChangedError: the loss changed the model while the tree was streamed.
        ValueError: as in `stemma.score`, or the loss is not a scalar tensor.
    """
    settings = ForwardSettings(temperature, entropy, aux_loss)
    chosen = choose_mode(model, tree, mode, max_tokens)
    if chosen == "shared" or (chosen == "plain" and max_tokens is None):
        shared = chosen == "shared"
        scores = _shared_scores(model, tree, settings) if shared else _plain_scores(model, tree, settings, None)
        value = scalar_loss(loss(scores))
        value.backward()
        return value.detach(), _detached(scores)
    if aux_loss:
        raise ValueError("the auxiliary loss is not a sum over parts of a batch: raise max_tokens or drop aux_loss.")
    if chosen == "plain":
        return _plain_backward(model, tree, loss, settings, max_tokens)
    assert max_tokens is not None
    return streamed_backward(model, tree, loss, settings, max_tokens)


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
        value = scalar_loss(
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


def _detached(scores: Scores) -> Scores:
    return replace(
        scores,
        logprobs=scores.logprobs.detach(),
        entropies=None if scores.entropies is None else scores.entropies.detach(),
        aux_loss=None if scores.aux_loss is None else scores.aux_loss.detach(),
    )
