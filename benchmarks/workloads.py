"""The workloads that every method runs: seeded token ids, the scored tokens and one fixed weight per scored token.

A workload is a list of prompts with a list of responses each. The scored tokens are the response tokens, and the loss
is the weighted sum of their log-probabilities, `sum(weight * log p) / number_of_scored_tokens`, with standard normal
weights: the form of a policy-gradient loss, in which no term cancels or dominates.

| name | prompts × prompt tokens | responses per prompt × tokens | what it stands for |
|---|---|---|---|
| W1 | 1 × 1024 | 8 × 128 | one GRPO group, long prompt |
| W2 | 1 × 2048 | 8 × 64 | one GRPO group, very long prompt |
| W3 | 1 × 256 | 8 × 256 | little to win: half of each sequence is its own |
| W4 | 8 × 256 | 4 × 64 | several groups with different prompts in one call |
| W5 | 1 × 512 | 16 × uniform(16, 256) | ragged responses |
| W6 | tree of depth 6, branching 2, 64 tokens per segment | 32 leaves | an agent that branches at every turn |
| W7 | 1 × 512 | 8, 32, 64 × 64 | memory against the group size |
| U1 | 8 × 128, all different | 1 × 256 | nothing shared: the plain path must be chosen |
| U2 | 1 × 16 | 8 × 256 | hardly anything shared |
| U3 | 8 × 128, all different | 1 × uniform(16, 512) | nothing shared and ragged |
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

VOCAB_SIZE = 8192


@dataclass(frozen=True)
class Workload:
    """Prompts, their responses and what the benchmark needs to know about them.

    `segments` gives the level boundaries of a multi-level workload (token counts from the root), which lets one-level
    methods choose the boundary that suits them best; a single-level workload leaves it empty.
    """

    name: str
    title: str
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    segments: tuple[int, ...] = ()
    vocab_size: int = VOCAB_SIZE

    @cached_property
    def rows(self) -> list[list[int]]:
        """Every sequence whole: prompt and response ids, prompts in order."""
        return [prompt + response for prompt, group in zip(self.prompts, self.responses) for response in group]

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Prompt length of each row."""
        return [len(prompt) for prompt, group in zip(self.prompts, self.responses) for _ in group]

    @cached_property
    def response_lengths(self) -> list[int]:
        """Response length of each row."""
        return [len(response) for group in self.responses for response in group]

    @property
    def total_tokens(self) -> int:
        return sum(map(len, self.rows))

    @cached_property
    def unique_tokens(self) -> int:
        """Distinct (path, token) pairs: counted by sorting the rows, independently of the library's tree."""
        ordered = sorted(self.rows)
        return len(ordered[0]) + sum(
            len(row) - shared_length(previous, row) for previous, row in itertools.pairwise(ordered)
        )

    @property
    def token_ratio(self) -> float:
        return self.total_tokens / self.unique_tokens

    @property
    def scored_tokens(self) -> int:
        return sum(self.response_lengths)

    @cached_property
    def weights(self) -> torch.Tensor:
        """(N, C) float32: the loss weight of response token c of row n; the same on every machine."""
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = (len(self.rows), max(self.response_lengths))
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))

    @cached_property
    def flat_weights(self) -> torch.Tensor:
        """(S,) float32: `weights` of the scored tokens, row by row."""
        return torch.cat([row[:length] for row, length in zip(self.weights, self.response_lengths)])

    def loss(self, logprobs_S: torch.Tensor) -> torch.Tensor:
        """The loss every method computes, from the flat log-probabilities of the scored tokens, row by row."""
        return (logprobs_S * self.flat_weights.to(logprobs_S)).sum() / self.scored_tokens

    @property
    def shapes(self) -> dict[str, object]:
        """What a result row says about the shapes."""
        lengths = self.response_lengths
        return {
            "prompts": len(self.prompts),
            "sequences": len(self.rows),
            "prompt_tokens": [min(self.prompt_lengths), max(self.prompt_lengths)],
            "response_tokens": [min(lengths), max(lengths)],
            "total_tokens": self.total_tokens,
            "unique_tokens": self.unique_tokens,
            "token_ratio": round(self.token_ratio, 4),
        }


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading ids that two rows have in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(different[0]) if len(different) else length


def pad_right(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """(N, L) int64, short rows filled with id 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def groups(
    name: str, title: str, prompt_tokens: int, response_tokens: int | tuple[int, int], group_size: int, prompts: int = 1
) -> Workload:
    """`prompts` random prompts, each with `group_size` random responses of a fixed or uniformly drawn length."""
    generator = np.random.default_rng(zlib.crc32(f"{name} tokens".encode()))

    def tokens(count: int) -> list[int]:
        return generator.integers(0, VOCAB_SIZE, count).tolist()

    def length() -> int:
        if isinstance(response_tokens, int):
            return response_tokens
        return int(generator.integers(response_tokens[0], response_tokens[1] + 1))

    prompt_ids = [tokens(prompt_tokens) for _ in range(prompts)]
    response_ids = [[tokens(length()) for _ in range(group_size)] for _ in range(prompts)]
    return Workload(name, title, prompt_ids, response_ids)


def agent_tree(name: str, title: str, depth: int, branching: int, segment_tokens: int) -> Workload:
    """A trajectory tree: the root segment is the prompt; every path below it is one response."""
    generator = np.random.default_rng(zlib.crc32(f"{name} tokens".encode()))

    def segment() -> list[int]:
        return generator.integers(0, VOCAB_SIZE, segment_tokens).tolist()

    root, paths = segment(), [[]]
    for _ in range(depth - 1):
        paths = [path + segment() for path in paths for _ in range(branching)]
    boundaries = tuple(segment_tokens * level for level in range(1, depth))
    return Workload(name, title, [root], [paths], segments=boundaries)


def gsm8k(folder: str | Path, problems: int = 4, shots: int = 8) -> Workload:
    """Real text: `problems` GSM8K questions behind one few-shot header, each with its four published model solutions.

    The header is common to all prompts, so the tree has two levels. The tokenizer is a byte-level BPE trained on the
    training file. `folder` holds `train.jsonl` and `example_model_solutions.jsonl` of openai/grade-school-math.
    """
    from stemma.models.tiny import train_tokenizer

    folder = Path(folder)
    with open(folder / "train.jsonl", encoding="utf-8") as lines:
        train = [json.loads(line) for line in lines]
    with open(folder / "example_model_solutions.jsonl", encoding="utf-8") as lines:
        solved = [json.loads(line) for _, line in zip(range(problems), lines)]
    texts = [f"Question: {record['question']}\nAnswer: {record['answer']}\n\n" for record in train]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    header = encode("".join(texts[:shots]))
    prompts = [header + encode(f"Question: {record['question']}\nAnswer: ") for record in solved]
    answers = [[value["solution"] for value in record.values() if isinstance(value, dict)] for record in solved]
    responses = [[encode(answer) for answer in group] for group in answers]
    title = f"GSM8K, {shots}-shot, {problems} problems × {len(responses[0])} solutions"
    return Workload("GSM8K", title, prompts, responses, (len(header),), max(VOCAB_SIZE, len(tokenizer)))


def make(name: str, scale: int = 1) -> Workload:
    """The workload of that name, every length divided by `scale` (1 is the definition)."""
    if name not in _WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; expected one of {', '.join(_WORKLOADS)}")
    return _WORKLOADS[name](scale)


_WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "W1": lambda s: groups("W1", "P 1024, R 128, G 8", 1024 // s, 128 // s, 8),
    "W2": lambda s: groups("W2", "P 2048, R 64, G 8", 2048 // s, 64 // s, 8),
    "W3": lambda s: groups("W3", "P 256, R 256, G 8", 256 // s, 256 // s, 8),
    "W4": lambda s: groups("W4", "8 × (P 256, R 64, G 4)", 256 // s, 64 // s, 4, prompts=8),
    "W5": lambda s: groups("W5", "P 512, R 16–256 (ragged), G 16", 512 // s, (16 // s, 256 // s), 16),
    "W6": lambda s: agent_tree("W6", "agent tree: depth 6, 32 leaves, 64-token segments", 6, 2, 64 // s),
    "W7-8": lambda s: groups("W7-8", "P 512, R 64, G 8", 512 // s, 64 // s, 8),
    "W7-32": lambda s: groups("W7-32", "P 512, R 64, G 32", 512 // s, 64 // s, 32),
    "W7-64": lambda s: groups("W7-64", "P 512, R 64, G 64", 512 // s, 64 // s, 64),
    "U1": lambda s: groups("U1", "nothing shared: 8 × (P 128, R 256, G 1)", 128 // s, 256 // s, 1, prompts=8),
    "U2": lambda s: groups("U2", "little shared: P 16, R 256, G 8", 16 // s, 256 // s, 8),
    "U3": lambda s: groups("U3", "nothing shared, 8 × (P 128, R 16–512, G 1)", 128 // s, (16 // s, 512 // s), 1, 8),
}
NAMES = tuple(_WORKLOADS)
