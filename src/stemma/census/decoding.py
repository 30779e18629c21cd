"""Decoding below shared prefixes against each row alone: forced tokens, one and two at a time, rows that leave."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stemma.cache.plan import CALL_BYTES
from stemma.census.configs import FIRST_ORDINARY_TOKEN, VOCAB_SIZE
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.scoring.enable import disable, enable

__all__ = ["decode_difference"]

_STEPS = (1, 1, 2, 1)
"""Tokens fed in each forward behind the first, which feeds the last token of every prompt."""


def decode_difference(model: PreTrainedModel, seed: int = 0) -> float:
    """Largest difference of a log-probability (nats) over the vocabulary, between decoding eight rows below shared
    prefixes, everything shared and as planned, and each row alone through the model as it is.

    Args:
        model: not enabled; comes back as it was.
        seed: of the tokens.

    Raises:
        UnsupportedModelError: the model cannot decode below a shared prefix.
    """
    prompts, new = _rows(seed)
    expected = [_alone(model, prompt, tail) for prompt, tail in zip(prompts, new)]
    enable(model, self_test=False)
    try:
        differences = [_shared_difference(model, prompts, new, expected, call) for call in (0, CALL_BYTES)]
    finally:
        disable(model)
    return max(differences)


def _rows(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts on three levels up to 47 tokens, an equal pair, one inside another, one of a single token; what follows
    each, five tokens."""
    generator = torch.Generator().manual_seed(seed)

    def run(length: int) -> list[int]:
        return torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE, (length,), generator=generator).tolist()

    head = run(17)
    left, right = head + run(19), head + run(12)
    prompts = [left + run(11), right + run(3), left + run(2), left, left, head[:5], run(1), run(30)]
    return prompts, [run(sum(_STEPS)) for _ in prompts]


def _alone(model: PreTrainedModel, prompt: list[int], tail: list[int]) -> Tensor:
    row = torch.tensor([prompt + tail])
    logits = model(input_ids=row, use_cache=False).logits.reshape(1, row.shape[1], -1)
    return logits[0, len(prompt) - 1 :].double().log_softmax(-1)


def _shared_difference(
    model: PreTrainedModel, prompts: list[list[int]], new: list[list[int]], expected: list[Tensor], call_bytes: int
) -> float:
    cache = SharedPrefixCache.of(model, prompts, room=2, min_shared=1, call_bytes=call_bytes)
    cache.positions_given = True  # in the calls below, by keyword
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    fed = torch.tensor([[prompt[-1], *tail] for prompt, tail in zip(prompts, new)])
    alive, place, worst = list(range(len(prompts))), 0, 0.0
    for count in (1, *_STEPS):
        if place == 2:  # two rows have ended
            keep = torch.tensor([row for row in range(len(prompts)) if row not in (1, 3)])
            cache.batch_select_indices(keep)
            alive, mask, fed = keep.tolist(), mask[keep], fed[keep]
        if place:
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
        output = model(
            input_ids=fed[:, place : place + count],
            attention_mask=mask,
            past_key_values=cache,
            position_ids=(mask.cumsum(1) - 1)[:, -count:],
            use_cache=True,
        )
        got = output.logits.reshape(len(alive), count, -1).double().log_softmax(-1)
        for row, values in zip(alive, got):
            difference = (values - expected[row][place : place + count]).abs().max()
            worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
        place += count
    cache.check_read()
    return worst
