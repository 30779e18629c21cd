"""A short comparison by which `enable` finds that a model's layers mix or count positions besides attention."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch
from torch import Tensor, nn

from stemma.errors import StemmaError, UnsupportedModelError
from stemma.models.adapter import base_model, in_mode, input_device, model_label
from stemma.models.limits import vocabulary_size
from stemma.models.rounding import higher_precision, in_higher_precision, rounded_anew, rounding_margin
from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import ForwardSettings, Targets, plain_forward, tree_forward

__all__ = ["SelfTest"]


class SelfTest:
    """Log-probabilities of a small tree against those of each of its sequences alone, without gradients.

    Made before the attention implementation is changed, so that the references come from the model as it was. `run`
    then compares them with the tree's and, once more, with those of each sequence alone.

    They may differ by the model's own rounding, measured by `stemma.models.rounding.rounded_anew`, times
    `rounding_margin`. A model in half precision, whose rounding hides all but large errors, is compared in float32 too
    where the memory is there for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inner = base_model(model)
        self.label = model_label(model)
        random = np.random.default_rng(0)
        stem, limb, *tails = (random.integers(0, vocabulary_size(self.inner), size=size) for size in (9, 4, 7, 6, 8))
        sequences = [[stem, limb, tails[0]], [stem, limb, tails[1]], [stem, tails[2]]]
        self.tree = PrefixTree.from_sequences([np.concatenate(parts) for parts in sequences], min_shared=1)
        # Packed tokens of the first sequence are the same row with and without a tree.
        first = int(self.tree.lengths[self.tree.order[0]])
        self.behind = torch.from_numpy(self.tree.path[self.tree.scored] >= first)
        self.references: dict[torch.dtype | None, tuple[Tensor, Tensor]] = {None: self._reference(None)}
        half = self.inner.dtype in (torch.float16, torch.bfloat16)
        wide = higher_precision(self.inner) if half else None
        if wide is not None:
            with suppress(RuntimeError, TypeError, NotImplementedError):  # some layers compute in half precision only
                self.references[wide] = self._reference(wide)

    def _reference(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of each sequence alone, and again with other rounding."""
        with self._computing_in(dtype):
            alone = self._alone()
            with rounded_anew(self.inner):
                return alone, self._alone()

    @contextmanager
    def _computing_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """A higher precision, or for None the model's own."""
        higher = nullcontext() if dtype is None else in_higher_precision(self.inner, dtype)
        with higher, torch.no_grad(), in_mode(self.model, training=False), _without_autocast(self.model):
            yield

    def _alone(self) -> Tensor:
        rows = [np.array([index]) for index in range(self.tree.num_sequences)]
        return torch.cat([plain_forward(self.model, self.tree, row, ForwardSettings())[0] for row in rows])

    def run(self) -> None:
        """Compare, now that the model dispatches.

        Raises:
            UnsupportedModelError: they differ by more than rounding, or the model cannot run the tree.
            NonFiniteError: the logits are NaN or infinite.
        """
        for dtype, (alone, rounded) in self.references.items():
            with self._computing_in(dtype):
                found = ((self._shared(), "over a prefix tree"), (self._alone(), "once its attention is dispatched"))
            for got, kind in found:
                difference = self._size(got - alone, dtype)
                explained = rounding_margin(dtype or self.inner.dtype) * self._size(rounded - alone, dtype)
                if not difference <= explained:
                    raise UnsupportedModelError(
                        f"{self.label} gives other log-probabilities {kind} ({difference:.1e} nats apart, its own "
                        f"rounding explains {explained:.0e}). Something besides attention mixes or counts "
                        "positions in it: recurrence, convolution, or positions that do not come from position_ids. "
                        "Use the plain forward for it."
                    )

    def _shared(self) -> Tensor:
        targets = Targets.of(self.tree)
        try:
            logprobs, _, _, _ = tree_forward(self.model, self.tree, targets, ForwardSettings())
        except StemmaError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.label} cannot run over a prefix tree: its forward failed on a packed row without a mask "
                f"({type(error).__name__}: {error}). Use the plain forward for it."
            ) from error
        return targets.gather(logprobs)

    def _size(self, difference: Tensor, dtype: torch.dtype | None) -> float:
        """Of a difference `(S,)` behind the first sequence."""
        behind = difference[self.behind.to(difference.device)].double()
        if dtype is None and len(self.references) > 1:
            # The higher precision tells. Here the median, as in half precision rounding sends tokens to other experts.
            return float(behind.abs().median())
        return float(behind.square().mean().sqrt())


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast off, so that weights of one precision are computed with in it; weights of several may need it."""
    device = input_device(model).type
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    with torch.autocast(device, enabled=mixed and torch.is_autocast_enabled(device)):
        yield
