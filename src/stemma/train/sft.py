"""Supervised training on labelled batches: the warm-up that gives reinforcement learning a policy to start from."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stemma.train import fit
from stemma.train.fit import Config

__all__ = ["IGNORED_LABEL", "Config", "Trainer", "labelled_tokens", "token_loss"]

IGNORED_LABEL = -100


def labelled_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens that have something to be predicted from and a label."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the labelled tokens, summed, and how many of them the model finds most likely.

    Args:
        model: a causal language model that returns `logits`.
        batch: `input_ids`, `attention_mask` and `labels`, each `(rows, length)` int64; labels are -100 where nothing is
            to be learnt.
    """
    inputs = {name: rows for name, rows in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORED_LABEL
    logits = model(**inputs, use_cache=False).logits[:, :-1][labelled].float()
    loss = nn.functional.cross_entropy(logits, labels[labelled], reduction="sum")
    return loss, {"mean_token_accuracy": (logits.argmax(-1) == labels[labelled]).sum().item()}


class Trainer(fit.Trainer):
    """`stemma.train.fit.Trainer` with the loss of labelled tokens; see there and `token_loss` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        batches: Callable[[int], Mapping[str, Tensor]],
        accelerator: Any = None,
    ) -> None:
        super().__init__(
            model, config, batches=batches, loss=token_loss, num_items=labelled_tokens, accelerator=accelerator
        )
