"""The language-model head of a model, taken over for the length of a forward.

A hook hands the head two rows instead of all positions, and the positions that predict something go through the head
afterwards, in chunks. What the model does behind its head (soft-capping, a scale) is told by those two rows: it is
found once for a model, by comparing the head's output with the model's logits, and each call checks that it holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemma.errors import NonFiniteError, UnsupportedModelError
from stemma.models.adapter import model_label
from stemma.prefix.logprob import chunked_logprobs

__all__ = ["Head"]


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


_tails: WeakKeyDictionary[nn.Module, _Tail] = WeakKeyDictionary()
"""What was found behind the head of each model."""


class Head:
    """Collects the hidden states of the predicting positions and scores targets from them."""

    def __init__(self, model: PreTrainedModel, row: Tensor, column: Tensor, shape: tuple[int, ...]) -> None:
        """`row` and `column` `(M,)` of the predicting positions in token ids of `shape` (rows, tokens)."""
        self.model, self.row, self.column, self.shape = model, row, column, shape
        self.module = model.get_output_embeddings()
        self.label = model_label(model)
        self.hidden: Tensor | None = None
        self.raw: Tensor | None = None
        self.autocast: tuple[str, torch.dtype, bool] | None = None
        self.thread = get_ident()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Take the head over; hooks of others on it see the two rows."""
        handles = [
            self.module.register_forward_pre_hook(self._take, prepend=True),
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
        flat, (rows, tokens) = hidden.flatten(0, -2), self.shape
        width = flat.shape[0] // rows
        # Prompt tuning of peft puts learned positions before the tokens of every row.
        index = self.row * width + self.column + (width - tokens)
        self.hidden = flat.index_select(0, index.to(hidden.device))
        # Scaled up, so that soft-capping shows even on the small logits of a fresh model.
        return (hidden[:1, :2] * 16, *arguments[1:])

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if get_ident() == self.thread:
            self.raw = output

    def score(
        self, logits: Tensor, target_position: Tensor, target_token: Tensor, *, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `(E,)` of the targets, and their entropies if asked for.

        Args:
            logits: what the model returned for the two rows that went through.
            target_position: `(E,)` which of the predicting positions predicts each target.
            target_token: `(E,)` token ids.
            temperature: logits are divided by it.
            entropy: give entropies too.

        Raises:
            NonFiniteError: a log-probability is NaN.
            UnsupportedModelError: the model uses its head, or changes its logits, in a way that is not known.
        """
        if self.hidden is None or self.raw is None or self.autocast is None:
            raise UnsupportedModelError(
                f"{self.label} does not call its language-model head as a module, so its log-probabilities cannot be "
                "computed in chunks."
            )
        tail = self._tail(self.raw.detach(), logits.detach())

        def head(hidden: Tensor) -> Tensor:
            output: Tensor = self.module(hidden[None])[0]  # as a module: hooks of others on it take part
            return tail(output)

        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            self._refuse_hooks_on_rows()
            logprobs, entropies = chunked_logprobs(
                head,
                self.hidden,
                target_position.to(self.hidden.device),
                target_token.to(self.hidden.device),
                vocabulary=int(self.raw.shape[-1]),
                temperature=temperature,
                entropy=entropy,
            )
        if logprobs.isnan().any():  # of one row, say, through the embedding of one token
            raise self._not_finite()
        return logprobs, entropies

    def _not_finite(self) -> NonFiniteError:
        assert self.raw is not None
        return NonFiniteError(
            f"the logits of {self.label} are not finite (NaN or infinite): its weights have diverged, or "
            f"{str(self.raw.dtype).removeprefix('torch.')} cannot hold its activations."
        )

    def _tail(self, raw: Tensor, logits: Tensor) -> _Tail:
        known = _tails.get(self.model)
        if known is not None and _explains(known, raw, logits):
            return known
        if not raw.isfinite().all():
            raise self._not_finite()
        config = self.model.config.get_text_config()
        numbers = {float(v) for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool)}
        guesses = [_Tail()]
        for number in sorted(numbers - {0.0}):
            guesses += [_Tail(softcap=number)] if number > 0 else []
            guesses += [_Tail(factor=number), _Tail(divisor=number)]
        for guess in guesses:
            if _explains(guess, raw, logits):
                _tails[self.model] = guess
                return guess
        raise UnsupportedModelError(
            f"{self.label} changes its logits behind the language-model head in a way that is neither a scale nor "
            "soft-capping with a number from its config."
        )

    def _refuse_hooks_on_rows(self) -> None:
        """Hooks of others see chunks of positions, so they must treat each position by itself."""
        if not (self.module._forward_hooks or self.module._forward_pre_hooks):
            return
        assert self.hidden is not None
        with torch.no_grad():
            rows = self.hidden.detach()[:2]
            together = self.module(rows[None])
            alone = torch.cat([self.module(row[None, None]) for row in rows], dim=1) if len(rows) else together
        most = _tolerance(together) * together.abs().max() if len(rows) else 0.0
        if together.shape != alone.shape or bool(((together - alone).abs() > most).any()):
            raise UnsupportedModelError(
                f"a hook on the language-model head of {self.label} gives a position other logits in the company of "
                "another one. Only the positions that predict something go through the head, in chunks: remove the "
                "hook, or let it treat each position by itself."
            )


def _explains(tail: _Tail, raw: Tensor, logits: Tensor) -> bool:
    value, tolerance = tail(raw.to(torch.float64)), max(_tolerance(raw), _tolerance(logits))
    return value.shape == logits.shape and torch.allclose(
        value, logits.to(torch.float64), rtol=tolerance, atol=tolerance * 1e-2
    )


def _tolerance(logits: Tensor) -> float:
    """Rounding of single values, relative."""
    return 2e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-5
