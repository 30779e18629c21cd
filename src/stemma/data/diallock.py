"""DialLock: a verifiable task, learnt from scratch by a small model in minutes, made entirely in code.

A dial of two digits shows a start `00`..`99` and has to reach a target by unit moves of one digit: `a` adds 1 to the
units, `b` takes 1 from the units, `c` adds 1 to the tens, `d` takes 1 from the tens; leaving 0..9 is illegal. Every
move restates the new state and the target, so a solution is a chain of thought with one decision in six tokens; `.`
ends it:

    prompt      87>64:
    completion  d77>64d67>64b66>64b65>64b64>64.<eos>

The distance d of a problem is |difference of tens| + |difference of units| (1..18); a solution may take d + slack
moves. Success of a policy that errs now and then decays with d, several optimal solutions exist, and one early mistake
can be repaired while a few cannot. A *many-shot* prompt is a number of solved problems followed by the one to solve:
solutions of one prompt then share a prefix of about 25 tokens a shot.

Everything random takes a `random.Random`, so a seed decides every problem, demonstration and batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Literal

from stemma.errors import InvalidDataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Episode",
    "Problem",
    "draw_problems",
    "draw_shots",
    "encode",
    "many_shot_prompt",
    "noisy_episode",
    "oracle_episode",
    "outcome",
    "packed_batch",
    "packed_sequence",
    "parse_prompt",
    "problems",
    "reward",
    "tokenizer",
    "turn",
    "verify",
]

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
VOCABULARY = (PAD_TOKEN, EOS_TOKEN, *"0123456789", *">:abcd.!\n")
PAD_ID, EOS_ID, VOCAB_SIZE = 0, 1, len(VOCABULARY)
MAX_DISTANCE = 18
TEST_FRACTION = 0.2
IGNORED_LABEL = -100

_ID_OF = {symbol: index for index, symbol in enumerate(VOCABULARY)}
_STEP = {"a": (0, 1), "b": (0, -1), "c": (1, 0), "d": (-1, 0)}
_PROMPT_LENGTH = 6


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Turn the dial from `start` to `target`, both in 0..99 and different."""

    start: int
    target: int

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 99 and 0 <= self.target <= 99) or self.start == self.target:
            raise InvalidDataError(f"a DialLock problem needs two different states in 0..99, got {self}")

    @property
    def distance(self) -> int:
        """Length of the shortest solution, in moves (1..18)."""
        return abs(self.start // 10 - self.target // 10) + abs(self.start % 10 - self.target % 10)

    @property
    def prompt(self) -> str:
        """The problem as text, such as `87>64:`."""
        return f"{self.start:02d}>{self.target:02d}:"

    @property
    def split(self) -> Literal["train", "test"]:
        """The half this problem belongs to, decided by a hash of its text alone."""
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") < TEST_FRACTION * 2**64 else "train"


@dataclass(frozen=True, slots=True)
class Episode:
    """A problem with a sequence of moves that solves it."""

    problem: Problem
    moves: str

    @property
    def completion(self) -> str:
        """The solution as text, such as `d77>64d67>64.`, without the end-of-sequence token."""
        state, parts = self.problem.start, []
        for move in self.moves:
            turned = turn(state, move)
            if turned is None:
                raise InvalidDataError(f"move {move!r} is illegal in state {state:02d} of {self}")
            state = turned
            parts.append(f"{move}{state:02d}>{self.problem.target:02d}")
        return "".join(parts) + "."

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the problem."""
        return encode(self.problem.prompt)

    @property
    def completion_ids(self) -> list[int]:
        """Token ids of the solution, end-of-sequence token included."""
        return [*encode(self.completion), EOS_ID]


def turn(state: int, move: str) -> int | None:
    """The state after `move` (one of `abcd`), or None where the move is illegal."""
    if move not in _STEP:
        return None
    tens, units = state // 10 + _STEP[move][0], state % 10 + _STEP[move][1]
    return 10 * tens + units if 0 <= tens <= 9 and 0 <= units <= 9 else None


@lru_cache(maxsize=1)
def _all_problems() -> tuple[Problem, ...]:
    return tuple(Problem(start, target) for start in range(100) for target in range(100) if start != target)


def problems(
    split: Literal["train", "test"] | None = None, *, min_distance: int = 1, max_distance: int = MAX_DISTANCE
) -> list[Problem]:
    """All problems of a split (None: both, 9,900 in all) with a distance in the closed range, in a fixed order.

    Raises:
        InvalidDataError: the split is unknown or the range holds no distance.
    """
    if split not in (None, "train", "test"):
        raise InvalidDataError(f"split must be 'train', 'test' or None, got {split!r}")
    if not 1 <= min_distance <= max_distance <= MAX_DISTANCE:
        raise InvalidDataError(
            f"distances must satisfy 1 <= min_distance <= max_distance <= {MAX_DISTANCE}, "
            f"got {min_distance} and {max_distance}"
        )
    return [
        problem
        for problem in _all_problems()
        if min_distance <= problem.distance <= max_distance and split in (None, problem.split)
    ]


def verify(problem: Problem, completion: str, *, slack: int = 2) -> bool:
    """Whether `completion` (text without the end-of-sequence token) solves `problem` in at most distance + slack moves.

    Strict: every move legal, every restated state and target right, the target reached, exactly one final `.`.
    """
    body = completion[:-1]
    if completion[-1:] != "." or len(body) % 6 or len(body) // 6 > problem.distance + slack:
        return False
    state = problem.start
    for i in range(0, len(body), 6):
        turned = turn(state, body[i])
        if turned is None or body[i + 1 : i + 6] != f"{turned:02d}>{problem.target:02d}":
            return False
        state = turned
    return state == problem.target


def reward(prompt_ids: Sequence[int], completion_ids: Sequence[int], *, slack: int = 2) -> float:
    """1.0 if the completion solves the last problem of the prompt and ends with the end-of-sequence token, else 0.0.

    Args:
        prompt_ids: token ids that end with a problem, with or without solved problems before it.
        completion_ids: sampled token ids; one cut off before its end-of-sequence token earns nothing.

    Raises:
        InvalidDataError: the prompt does not end with a problem.
    """
    problem = parse_prompt(prompt_ids)
    if not completion_ids or completion_ids[-1] != EOS_ID:
        return 0.0
    body = completion_ids[:-1]
    if not all(EOS_ID < token < VOCAB_SIZE for token in body):
        return 0.0
    return float(verify(problem, "".join(VOCABULARY[token] for token in body), slack=slack))


Outcome = Literal["right", "wrong text", "illegal move", "stopped elsewhere", "too many moves", "cut off"]


def outcome(problem: Problem, completion_ids: Sequence[int], *, slack: int = 2) -> Outcome:
    """What became of an attempt: "right" where `reward` is 1, else the first thing that went wrong.

    "wrong text" is a state or target restated wrongly, or anything that is no move; "stopped elsewhere" ends at another
    state than the target; "cut off" has no end-of-sequence token.
    """
    ended = bool(completion_ids) and completion_ids[-1] == EOS_ID
    body = completion_ids[:-1] if ended else completion_ids
    text = "".join(VOCABULARY[token] if EOS_ID < token < VOCAB_SIZE else "?" for token in body)
    state, place = problem.start, 0
    while text[place : place + 1] not in (".", ""):
        turned = turn(state, text[place])
        if turned is None:
            return "illegal move" if text[place] in _STEP else "wrong text"
        told, expected = text[place + 1 : place + 6], f"{turned:02d}>{problem.target:02d}"
        if told != expected:
            return "wrong text" if ended or not expected.startswith(told) else "cut off"
        state, place = turned, place + 6
    if not ended:
        return "cut off" if text[place:] in (".", "") else "wrong text"
    if text[place:] != ".":
        return "wrong text"
    if state != problem.target:
        return "stopped elsewhere"
    return "right" if place // 6 <= problem.distance + slack else "too many moves"


def parse_prompt(prompt_ids: Sequence[int]) -> Problem:
    """The problem that a prompt asks for: its last six tokens.

    Raises:
        InvalidDataError: they are not of the form `87>64:`.
    """
    tail = "".join(VOCABULARY[token] if 0 <= token < VOCAB_SIZE else "?" for token in prompt_ids[-_PROMPT_LENGTH:])
    start, separator, target = tail[0:2], tail[2:3], tail[3:5]
    if len(tail) != _PROMPT_LENGTH or separator != ">" or tail[5] != ":" or not (start + target).isdigit():
        raise InvalidDataError(f"a DialLock prompt ends with a problem such as '87>64:', got {tail!r}")
    return Problem(int(start), int(target))


def oracle_episode(problem: Problem, rng: Random) -> Episode:
    """A shortest solution, drawn by choosing at random among the moves that come nearer."""
    return noisy_episode(problem, rng, noise=0.0)


def noisy_episode(problem: Problem, rng: Random, *, noise: float = 0.5) -> Episode:
    """A solution by an expert whose every move is, with probability `noise`, a random legal one instead.

    Args:
        noise: probability in [0, 1); 0 gives a shortest solution. The walk goes on until it meets the target, so a
            noisy solution may exceed any budget.
    """
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"noise must lie in [0, 1), got {noise}")
    state, moves = problem.start, []
    while state != problem.target:
        legal = [move for move in _STEP if turn(state, move) is not None]
        move = rng.choice(legal if rng.random() < noise else _nearer_moves(state, problem.target))
        moves.append(move)
        state += 10 * _STEP[move][0] + _STEP[move][1]
    return Episode(problem, "".join(moves))


def _nearer_moves(state: int, target: int) -> list[str]:
    tens, units = target // 10 - state // 10, target % 10 - state % 10
    moves = {"a": units > 0, "b": units < 0, "c": tens > 0, "d": tens < 0}
    return [move for move, comes_nearer in moves.items() if comes_nearer]


def many_shot_prompt(shots: Sequence[Episode], query: Problem) -> list[int]:
    """Token ids of solved problems, each closed by the end-of-sequence token, followed by the problem to solve."""
    ids: list[int] = []
    for episode in shots:
        ids += episode.prompt_ids + episode.completion_ids
    return ids + encode(query.prompt)


def draw_problems(pool: Sequence[Problem], count: int, rng: Random, *, exclude: Problem | None = None) -> list[Problem]:
    """`count` different problems of `pool`, never the excluded one: every distance equally often, then any problem.

    Drawing uniformly from the pool instead would favour far problems, of which there are more.

    Raises:
        InvalidDataError: the pool is too small.
    """
    buckets = _by_distance([problem for problem in pool if problem != exclude])
    available = sum(map(len, buckets))
    if count > available:
        raise InvalidDataError(f"cannot draw {count} problems from {available}; enlarge the pool")
    drawn: list[Problem] = []
    for _ in range(count):
        bucket = rng.choice(buckets)
        drawn.append(bucket.pop(rng.randrange(len(bucket))))
        if not bucket:
            buckets.remove(bucket)
    return drawn


def draw_shots(
    pool: Sequence[Problem], count: int, rng: Random, *, exclude: Problem | None = None, noise: float = 0.0
) -> list[Episode]:
    """`count` different problems drawn as in `draw_problems`, each with a demonstration of the given noise."""
    return [noisy_episode(problem, rng, noise=noise) for problem in draw_problems(pool, count, rng, exclude=exclude)]


def _by_distance(pool: Sequence[Problem]) -> list[list[Problem]]:
    buckets: dict[int, list[Problem]] = {}
    for problem in pool:
        buckets.setdefault(problem.distance, []).append(problem)
    return [buckets[distance] for distance in sorted(buckets)]


def packed_sequence(episodes: Sequence[Episode]) -> tuple[list[int], list[int]]:
    """Episodes packed into one training sequence.

    Returns:
        `(input_ids, labels)` of equal length. A label equals the token at its own position (the shift is the model's
        business) and is -100 on problem statements: their digits are random, so a loss on them is only noise.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for episode in episodes:
        prompt, completion = episode.prompt_ids, episode.completion_ids
        input_ids += prompt + completion
        labels += [IGNORED_LABEL] * len(prompt) + completion
    return input_ids, labels


def packed_batch(
    pool: Sequence[Problem],
    rng: Random,
    *,
    sequences: int = 16,
    episodes: int = 4,
    noise: float = 0.5,
) -> dict[str, torch.Tensor]:
    """A batch for supervised training: each sequence packs `episodes` demonstrations.

    Their problems are drawn from `pool` with replacement: every distance equally often, then any problem.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (sequences, longest) int64 and right-padded with
        `<pad>`, 0 and -100: the keyword arguments of a Hugging Face causal language model.
    """
    import torch

    if not pool:
        raise InvalidDataError("cannot draw demonstrations from an empty pool of problems")
    buckets = _by_distance(pool)
    rows = [
        packed_sequence([noisy_episode(rng.choice(rng.choice(buckets)), rng, noise=noise) for _ in range(episodes)])
        for _ in range(sequences)
    ]
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values], dtype=torch.int64)

    return {
        "input_ids": padded([ids for ids, _ in rows], PAD_ID),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED_LABEL),
    }


def encode(text: str) -> list[int]:
    """Token ids of a text made of the task's characters (`<eos>` and `<pad>` are ids 1 and 0, not text, here).

    Raises:
        InvalidDataError: a character is outside the vocabulary.
    """
    try:
        return [_ID_OF[character] for character in text]
    except KeyError as error:
        raise InvalidDataError(f"character {error.args[0]!r} is not in the DialLock vocabulary") from None


def tokenizer() -> PreTrainedTokenizerFast:
    """The task's character-level tokenizer (21 tokens) as an ordinary Hugging Face tokenizer.

    It agrees with `encode`, reads `<eos>` and `<pad>` inside a text as the special tokens, and decodes without adding
    spaces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocab=dict(_ID_OF)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
