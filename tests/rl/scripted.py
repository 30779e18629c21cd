"""A generator that says what a test tells it to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stemma.data.diallock import EOS_ID
from stemma.decode.rollout import Rollouts


class Scripted:
    """A generator that says what it is told to: `says(prompt, index of the completion)`; DialLock's end token."""

    def __init__(self, says: Callable[[list[int], int], Sequence[int]]) -> None:
        self.says, self.calls = says, []

    def __call__(self, model: Any, prompts: Any, /, *, num_generations: int, **options: Any) -> Rollouts:
        self.calls.append((list(map(list, prompts)), num_generations, options))
        groups = [[list(self.says(list(p), i)) for i in range(num_generations)] for p in prompts]
        return Rollouts(
            prompts=[list(p) for p in prompts],
            completions=groups,
            logprobs=[[torch.zeros(len(ids)) for ids in group] for group in groups],
            finished=[[ids[-1:] == [EOS_ID] for ids in group] for group in groups],
            forced_lengths=[[0] * num_generations for _ in prompts],
            prefilled_tokens=sum(map(len, prompts)),
            decoded_tokens=sum(max(len(ids) - 1, 0) for group in groups for ids in group),
        )
