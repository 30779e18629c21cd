"""One forward call of a model, over a tree or over padded rows, down to the log-probability of each scored token.

The language-model head is taken over for the length of a call: a hook hands the head two rows instead of all positions,
and the positions that predict something go through the head afterwards, in chunks. What the model does behind its head
(soft-capping, a scale) is inferred from those two rows, by comparing the head's output with the model's logits, and
checked in every call; a model that does something else is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemma.errors import UnsupportedModelError
from stemma.models.adapter import LAYOUT_ARGUMENT, TreeCall, base_model, is_enabled, tree_call
from stemma.prefix.layout import Layout
from stemma.prefix.logprob import chunked_logprobs
from stemma.prefix.tree import PrefixTree

__all__ = ["ForwardSettings", "Targets", "check_calls", "check_model", "plain_forward", "tree_forward"]


@dataclass(frozen=True)
class ForwardSettings:
    """What a caller of ``score`` wants from each forward."""

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
    """``(E,)`` packed index of the predicting token, non-decreasing."""
    token: np.ndarray
    """``(E,)`` predicted token id."""
    of_scored: np.ndarray
    """``(S,)``: the target of each scored token, sequence by sequence."""

    @classmethod
    def of(cls, tree: PrefixTree) -> "Targets":
        """The targets of a tree. A packed token stands for the target that leads to it."""
        targets = tree.scored_targets
        predictor = tree.previous[targets]
        order = np.argsort(predictor, kind="stable")
        target_of = np.zeros(tree.unique_tokens, dtype=np.int64)
        target_of[targets[order]] = np.arange(order.size)
        return cls(predictor[order], tree.packed_tokens[targets[order]], target_of[tree.path[tree.scored]])

    def between(self, begin: int, end: int) -> slice:
        """The targets predicted by packed tokens ``[begin, end)``."""
        return slice(*(int(cut) for cut in np.searchsorted(self.predictor, [begin, end])))


# ---------------------------------------------------------------------- what is refused before any work


def check_model(model: nn.Module) -> None:
    """Refuse what would make a shared forward differ from each sequence alone: no ``enable``, active dropout.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    inner = base_model(model)
    if not is_enabled(model):
        raise UnsupportedModelError(
            f"{type(inner).__name__} has not been enabled for shared prefixes; call stemma.enable(model) first. "
            '(stemma.score and stemma.backward do without it in mode="plain".)'
        )
    if getattr(inner.config, "output_attentions", False):
        raise UnsupportedModelError(
            "config.output_attentions asks for attention weights, which tree attention never forms. "
            'Set it to False. (stemma.score and stemma.backward leave it alone in mode="plain".)'
        )
    if inner.training and getattr(inner.config.get_text_config(), "router_jitter_noise", 0):
        raise UnsupportedModelError(
            "config.router_jitter_noise draws other noise for a shared prefix than for repeated ones. Set it to 0, or "
            "call model.eval()."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise UnsupportedModelError(
                f"Active dropout {module.p} in '{name}': a shared prefix would be dropped once where repeated prefixes "
                "are dropped differently each time. Set the dropout to 0 (lora_dropout=0 for LoRA), or call "
                "model.eval()."
            )


# ---------------------------------------------------------------------- the head


class _Head:
    """Collects the hidden states of the predicting positions and scores targets from them."""

    def __init__(self, model: PreTrainedModel, positions: Tensor) -> None:
        self.model, self.positions = model, positions
        self.module = model.get_output_embeddings()
        self.hidden: Tensor | None = None
        self.raw: Tensor | None = None
        self.autocast: tuple[str, torch.dtype, bool] | None = None
        self.thread = get_ident()

    @contextmanager
    def capture(self) -> Iterator[None]:
        handles = [
            self.module.register_forward_pre_hook(self._take),
            self.module.register_forward_hook(self._keep),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if get_ident() != self.thread:
            return arguments  # a forward of its own, which happens to run now
        hidden = arguments[0]
        device = hidden.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.hidden = hidden.flatten(0, -2).index_select(0, self.positions.to(hidden.device))
        # Larger than life, so that soft-capping shows even on the small logits of a fresh model.
        return (hidden[:1, :2] * 16, *arguments[1:])

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if get_ident() == self.thread:
            self.raw = output

    def score(
        self, logits: Tensor, target_position: Tensor, target_token: Tensor, settings: ForwardSettings
    ) -> tuple[Tensor, Tensor | None]:
        """Scores ``(E,)`` of the targets; ``logits`` are what the model returned for the two rows that went through."""
        label = f"{type(self.model).__name__} (model type '{self.model.config.model_type}')"
        if self.hidden is None or self.raw is None or self.autocast is None:
            raise UnsupportedModelError(
                f"{label} does not call its language-model head as a module, so its log-probabilities cannot be "
                "computed in chunks."
            )
        tail = _tail(self.model, self.raw.detach(), logits.detach())
        if tail is None:
            raise UnsupportedModelError(
                f"{label} changes its logits behind the language-model head in a way that is neither a scale nor "
                "soft-capping with a number from its config."
            )

        def head(hidden: Tensor) -> Tensor:
            return tail(self.module.forward(hidden))

        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return chunked_logprobs(
                head,
                self.hidden,
                target_position.to(self.hidden.device),
                target_token.to(self.hidden.device),
                vocabulary=int(self.raw.shape[-1]),
                temperature=settings.temperature,
                entropy=settings.entropy,
            )


@dataclass(frozen=True)
class _Tail:
    """What a model does to its logits behind the head."""

    factor: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            return self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.factor == self.divisor == 1.0 else logits * self.factor / self.divisor


def _tail(model: PreTrainedModel, raw: Tensor, logits: Tensor) -> _Tail | None:
    """What the model does between head and logits: nothing, or a scale or soft-cap with a number from its config."""
    low = raw.dtype in (torch.float16, torch.bfloat16) or logits.dtype in (torch.float16, torch.bfloat16)
    tolerance = 2e-2 if low else 1e-5
    raw, logits = raw.to(torch.float64), logits.to(torch.float64)
    config = model.config.get_text_config()
    numbers = {float(v) for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool) and v}
    guesses = [_Tail()]
    for number in sorted(numbers):
        guesses += [_Tail(softcap=number)] if number > 0 else []
        guesses += [_Tail(factor=number), _Tail(divisor=number)]
    for guess in guesses:
        value = guess(raw)
        if value.shape == logits.shape and torch.allclose(value, logits, rtol=tolerance, atol=tolerance * 1e-2):
            return guess
    return None


# ---------------------------------------------------------------------- forward calls


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
    """Forward the packed tokens ``[begin, end)`` and score the targets they predict.

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
        Log-probabilities of ``targets.between(begin, end)``, entropies or None, the auxiliary loss or None, and the
        call with what was captured.
    """
    inner = base_model(model)
    layout = Layout.of(tree, begin, end)
    end = begin + layout.num_tokens
    device = inner.get_input_embeddings().weight.device
    part = targets.between(begin, end)
    predictors, target_position = np.unique(targets.predictor[part] - begin, return_inverse=True)
    head = _Head(inner, torch.from_numpy(predictors))
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
        output.logits, torch.from_numpy(target_position.reshape(-1)), torch.from_numpy(targets.token[part]), settings
    )
    return logprobs, entropies, _aux_loss(inner, output, settings), call


def check_calls(model: nn.Module, call: TreeCall) -> None:
    """Refuse a model of which some layer did not ask for attention on the call.

    Raises:
        UnsupportedModelError: names the model and the number of layers.
    """
    inner = base_model(model)
    label = f"{type(inner).__name__} (model type '{inner.config.model_type}')"
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
        sequences: ``(n,)`` indices of the sequences to run, in the order of the result.
        settings: temperature, entropies, auxiliary loss.

    Returns:
        Log-probabilities of the scored tokens, sequence by sequence, entropies or None, the auxiliary loss or None, and
        the number of tokens that went through the model, padding included.
    """
    inner = base_model(model)
    device = inner.get_input_embeddings().weight.device
    rows = [tree.sequence(int(i)) for i in sequences]
    width = max(row.size for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    positions, tokens = [], []
    for index, (i, row) in enumerate(zip(sequences, rows, strict=True)):
        ids[index, : row.size] = row
        mask[index, : row.size] = 1
        wanted = np.flatnonzero(tree.scored[tree.offsets[i] : tree.offsets[i + 1]])
        positions.append(index * width + wanted - 1)
        tokens.append(row[wanted])
    position, token = np.concatenate(positions), np.concatenate(tokens)
    head = _Head(inner, torch.from_numpy(position))
    extra: dict[str, Any] = {"output_router_logits": True} if settings.aux_loss else {}
    # Padding on the right is never seen by the tokens before it, so only the router's statistics need the mask; without
    # one, fused attention takes its causal path.
    attention_mask = torch.from_numpy(mask).to(device) if settings.aux_loss else None
    with head.capture():
        output = model(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=attention_mask, use_cache=False, **extra
        )
    logprobs, entropies = head.score(output.logits, torch.arange(position.size), torch.from_numpy(token), settings)
    return logprobs, entropies, _aux_loss(inner, output, settings), ids.size
