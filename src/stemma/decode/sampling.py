"""From logits to a token: temperature, top-k, nucleus, and the strings that end a text.

A draw is a function of the logits and one uniform number, which the caller owns, so that a row's samples do not depend
on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stemma.errors import NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StopCondition", "TokenSampler", "sampling_dtype"]


@dataclass(frozen=True, slots=True)
class TokenSampler:
    """Inverse transform sampling from the distribution that is left after temperature, `top_k` and `top_p`.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of most likely tokens whose probability reaches `top_p`, in (0, 1].
        top_k: sample from the `top_k` most likely tokens; 0 means all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")

    def logprobs(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., V) at the temperature, before `top_k` and `top_p`; at 0 those of the plain softmax.

        Raises:
            NonFiniteError: the logits are not numbers.
        """
        logits = logits.to(sampling_dtype(logits))
        if self.temperature > 0:
            logits = logits / self.temperature
        logprobs = logits.log_softmax(-1)
        if logprobs.isnan().any():
            raise NonFiniteError(
                "the model's logits are not finite while sampling: its weights have diverged or its precision is too "
                "low; lower the learning rate, or load the model in float32"
            )
        return logprobs

    def __call__(self, logits_NV: Tensor, uniform_N: Tensor, forced_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (N,) int64 and their log-probabilities (N,), from logits and one uniform number in [0, 1) per row.

        Where `forced_N` is not negative, it is the token.
        """
        logprobs_NV = self.logprobs(logits_NV)
        if self.temperature == 0:
            tokens_N = logits_NV.argmax(-1)
        else:
            # Accumulated in float64: rounding never picks a token of probability zero.
            cumulative_NV = self._kept_probabilities(logprobs_NV).double().cumsum(-1)
            threshold_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
            # A float64 below 1 times the total may round up to the total, which no entry exceeds.
            threshold_N1 = torch.minimum(threshold_N1, cumulative_NV[:, -1:] * (1 - 2**-52))
            tokens_N = torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)
        if forced_N is not None:
            tokens_N = torch.where(forced_N >= 0, forced_N, tokens_N)
        return tokens_N, logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1)

    def _kept_probabilities(self, logprobs_NV: Tensor) -> Tensor:
        """Probabilities (N, V), zero outside the top `top_k`, and then outside the nucleus of mass `top_p`."""
        kept_NV = logprobs_NV
        if 0 < self.top_k < kept_NV.shape[1]:
            least_N1 = kept_NV.topk(self.top_k, dim=-1).values[:, -1:]
            kept_NV = kept_NV.masked_fill(kept_NV < least_N1, float("-inf"))
        probabilities_NV = kept_NV.softmax(-1)
        if self.top_p < 1:
            sorted_NV, order_NV = probabilities_NV.sort(dim=-1, descending=True, stable=True)
            # A token is kept while the mass before it is below top_p, so the most likely one always is.
            outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= self.top_p
            probabilities_NV = torch.zeros_like(sorted_NV).scatter(1, order_NV, sorted_NV.masked_fill(outside_NV, 0))
        return probabilities_NV


def sampling_dtype(logits: Tensor) -> torch.dtype:
    """The type that probabilities are computed in: float32, or float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class StopCondition:
    """Whether a token ends its row: as an end-of-sequence token, or by completing a stop string of sampled text.

    Args:
        eos_ids: ids that end a row wherever they stand.
        stop_strings: a text ends with the token that completes one of them; text of forced tokens does not count.
        tokenizer: of the model; needed with `stop_strings`.

    Raises:
        ValueError: stop strings that are empty, that no token of the vocabulary can complete, or without a tokenizer.
    """

    def __init__(
        self,
        eos_ids: Sequence[int],
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64)
        self._strings = None
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        if not strings:
            return
        if tokenizer is None:
            raise ValueError(
                f"stop_strings {strings} need the tokenizer that turns token ids into text; pass tokenizer="
            )
        if "" in strings:
            raise ValueError("stop_strings has an empty string, which would end every row before it begins; remove it")
        from transformers import StopStringCriteria

        self._strings = StopStringCriteria(tokenizer, strings)

    def __call__(self, tokens_NT: Tensor, forced_NT: Tensor) -> Tensor:
        """(N,) bool: whether the row ends with the last of its tokens so far.

        Args:
            tokens_NT: (N, T) int64, the tokens of each row so far.
            forced_NT: (N, T) int64, those among them that were forced, -1 elsewhere.
        """
        self.eos_ids = self.eos_ids.to(tokens_NT.device)
        ended_N = torch.isin(tokens_NT[:, -1], self.eos_ids)
        if self._strings is not None:
            window = slice(-self._strings.maximum_token_len, None)
            # The criterion takes an id outside the vocabulary for a token that belongs to no string.
            outside = torch.iinfo(torch.int64).max
            sampled_NT = tokens_NT[:, window].masked_fill(forced_NT[:, window] >= 0, outside)
            ended_N = ended_N | self._strings(sampled_NT, None).to(tokens_NT.device)
        return ended_N
