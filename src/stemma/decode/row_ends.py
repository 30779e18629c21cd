"""Where the rows of a call of transformers' `generate` end, as decoding found it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

__all__ = ["RowEnds"]


class RowEnds(StoppingCriteria):
    """Applies criteria that end a row and notes where they did.

    Token values do not tell: the padding behind a row may be an end-of-sequence token, and a sampled token may look
    like padding.

    Args:
        criteria: all that end single rows. What ends all rows together (a length, a time) needs no note.
        num_beams: of the search; beams change places, so the ends of theirs are known by their tokens.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], num_beams: int) -> None:
        self.criteria, self.num_beams = StoppingCriteriaList(criteria), num_beams
        self._lengths: Tensor | None = None
        self._ended: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        ended: Tensor = self.criteria(input_ids, scores, **kwargs)
        if self.num_beams > 1:
            self._ended.update(map(tuple, input_ids[ended].tolist()))
            return ended
        if self._lengths is None:
            self._lengths = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        self._lengths[ended & (self._lengths == 0)] = input_ids.shape[1]
        return ended

    def cut(self, sequences: Tensor, prompt_length: int) -> list[list[int]]:
        """The new tokens of each row of `(rows, length)`, the one that ended it included."""
        rows = sequences.tolist()
        if self.num_beams > 1:
            ends = [self._end_of(tuple(row), prompt_length) for row in rows]
        else:
            assert self._lengths is not None
            ends = self._lengths.tolist()
        return [row[prompt_length : end or len(row)] for row, end in zip(rows, ends, strict=True)]

    def _end_of(self, row: tuple[int, ...], prompt_length: int) -> int:
        return next((end for end in range(prompt_length + 1, len(row)) if row[:end] in self._ended), len(row))
