"""PrefixRL: reinforcement learning on hard problems that begins where an earlier success left off.

Use it where a problem is never solved, so that every reward is 0 and there is nothing to learn from. One correct
solution of it, found by long rejection sampling or by another model, is cut off part of the way and given to the policy
as context: from there it succeeds often enough to learn, and what it learns carries over to the problem without the
prefix.

Source: "Reuse your FLOPs: Scaling RL on Hard Problems by Conditioning on Very Off-Policy Prefixes", 2026, arXiv
2601.18795. With one verified trace `y_x` (`Trace.trace_ids`) for each hard problem `x` (`Trace.prompt_ids`), drawn once
and then frozen:

    D_pre: for each x, 3 (`cuts_per_problem`) prefixed problems x ⊕ y_x[:h],  h ~ U(0.4, 0.8) |y_x|  (`ratio`)
    max    Σ_{D_pre} E_{y ~ π(· | x ⊕ y_x[:h])} r(x, y_x[:h] ⊕ y)  +  Σ_D E_{y ~ π(· | x)} r(x, y)             (Eq. 3.1)

sampled uniformly over the union, so 3 prefixed problems to 1 plain one. The prefix is part of the prompt
(`prompt_ids`), so it gets no gradient and no importance weight, and a group never mixes prefixes; the verifier sees it
as the beginning of the completion (`prefix_ids`). The policy gradient has the group's mean as its baseline: train with
`grpo.Config(scale_rewards="none")`, as `Config.defaults` says. Evaluate without prefixes.

What we changed: `h` is uniform over the whole numbers of tokens within the ratio, so that it never leaves it; cuts can
be restricted to boundaries; traces are kept as token ids from sampling to training. We estimate sampling at 2ND
operations as the paper does, with D all sampled tokens and each prompt once per round.

Relations: a choice of prompts alone, so any rollout, credit (such as tree credit) and loss of the trainer goes with it.
The shared forward encodes problem and prefix once per group.

```python
from stemma.data.traces import Trace
from stemma.rl.prefix_rl import build_prefixed_problems

trace = Trace(prompt_ids=[1, 2, 3], trace_ids=list(range(10, 30)), verified=True)
problems = build_prefixed_problems([trace], cuts_per_problem=3, ratio=(0.4, 0.8))
for row in problems:  # three that begin with 8 to 16 tokens of the solution, and the problem itself
    assert row["prompt_ids"] == [1, 2, 3, *row.get("prefix_ids", [])]
print(len(problems))
# prints: 4
```
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal, overload

from stemma.data.traces import Trace
from stemma.errors import InvalidDataError
from stemma.models.limits import max_positions, vocabulary_size
from stemma.rl.engine.hooks import IsBoundary, Need, Reward, Run, ShuffledRows
from stemma.rl.engine.options import check_fields, require
from stemma.train.seeds import stream_seed

__all__ = ["Config", "PrefixedProblems", "build_prefixed_problems", "hooks", "rewards_by_kind"]

TooLong = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of training on problems that begin with part of a solution."""

    needs: ClassVar[tuple[Need, ...]] = ("traces",)
    defaults: ClassVar[Mapping[str, Any]] = {"scale_rewards": "none"}
    """What the paper sets other than GRPO's defaults among the trainer's options."""

    cuts_per_problem: int = 3
    """Prefixed problems made of each trace, >= 1."""
    prefix_ratio_min: float = 0.4
    """Shortest prefix as a fraction of the trace, in [0, prefix_ratio_max]."""
    prefix_ratio_max: float = 0.8
    """Longest prefix as a fraction of the trace, below 1: the end of an answer is never given away."""
    include_unprefixed: bool = True
    """Train on the plain problems too."""
    too_long: TooLong = "error"
    """Refuse prefixed problems that leave no room for a completion (error), or leave them out (skip)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "cuts_per_problem", self.cuts_per_problem >= 1, "at least 1")
        require(self, "prefix_ratio_max", 0 <= self.prefix_ratio_max < 1, "in [0, 1)")
        valid = 0 <= self.prefix_ratio_min <= self.prefix_ratio_max
        require(self, "prefix_ratio_min", valid, f"in [0, prefix_ratio_max={self.prefix_ratio_max}]")


# ------------------------------------------------------------------ prefixed problems


@dataclass(frozen=True)
class PrefixedProblems(Sequence[dict[str, Any]]):
    """Rows of prefixed and plain problems, and what was left out of them."""

    rows: list[dict[str, Any]]
    """Per problem its prefixed rows, then its plain one."""
    unsolved: int
    """Problems without a trace."""
    too_short: int
    """Traces without a place to cut within the ratio: shorter than 2 tokens, or without a boundary there."""
    too_long: int
    """Rows longer than `max_prompt_length`."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self.rows[index]


def build_prefixed_problems(
    traces: Iterable[Trace],
    *,
    cuts_per_problem: int = 3,
    ratio: tuple[float, float] = (0.4, 0.8),
    include_unprefixed: bool = True,
    seed: int = 0,
    is_boundary: IsBoundary | None = None,
    max_prompt_length: int | None = None,
    too_long: TooLong = "error",
) -> PrefixedProblems:
    """The frozen training set: every problem with some prefixes of its trace, and once without.

    Args:
        traces: verified ones; problems that were given up are counted and left out, plain rows too.
        cuts_per_problem: prefixed rows per problem, drawn independently.
        ratio: smallest and largest length of a prefix as a fraction of its trace; below 1, so that the end-of-sequence
            token, and usually the final answer, is never in it.
        include_unprefixed: add each problem's plain row.
        seed: decides the cuts, for each problem on its own.
        is_boundary: restricts the cuts, for example to line ends, or to places before the final answer:
            `lambda ids, h: final_answer(decode(ids[:h])) is None`.
        max_prompt_length: most tokens of problem and prefix together: the model's context less
            `max_completion_length`. None: no limit.
        too_long: what becomes of a prefixed row beyond that: "error", or "skip", which counts it.

    Returns:
        Rows with `prompt_ids`, the trace's columns and `prefix_fraction` (0 for plain rows); prefixed ones also have
        `prefix_ids`, the tail of `prompt_ids` that belongs to the answer.

    Raises:
        ValueError: an option is out of its range.
        InvalidDataError: a trace is not verified or too long, or no trace is left.
    """
    low, high = ratio
    if not 0 <= low <= high < 1:
        raise ValueError(f"ratio must be two ascending fractions in [0, 1), got {ratio}")
    if cuts_per_problem < 0 or cuts_per_problem + include_unprefixed == 0:
        raise ValueError(f"cuts_per_problem must be at least 1, or 0 with plain problems; got {cuts_per_problem}")
    if too_long not in ("error", "skip"):
        raise ValueError(f"too_long must be 'error' or 'skip', got {too_long!r}")
    rows: list[dict[str, Any]] = []
    count = unsolved = short = long = 0
    for index, trace in enumerate(traces):
        count += 1
        if not trace.trace_ids:
            unsolved += 1
            continue
        if not trace.verified:
            raise InvalidDataError(
                f"trace {index + 1} is not verified: the policy would be led towards an error; keep traces that the "
                "verifier accepts"
            )
        size, rng = len(trace.trace_ids), Random(stream_seed(seed, "cuts", index))
        cuts = _draw_cuts(trace.trace_ids, cuts_per_problem, low, high, rng, is_boundary)
        if size < 2 or len(cuts) < cuts_per_problem:
            short += 1
            continue
        for cut in [*cuts, None] if include_unprefixed else cuts:
            prefix = trace.trace_ids[: cut or 0]
            row = {**trace.columns, "prompt_ids": [*trace.prompt_ids, *prefix], "prefix_fraction": len(prefix) / size}
            if cut is not None:
                row["prefix_ids"] = prefix
            if max_prompt_length is None or len(row["prompt_ids"]) <= max_prompt_length:
                rows.append(row)
            elif too_long == "skip":
                long += 1
            else:
                raise InvalidDataError(
                    f"trace {index + 1}: problem and prefix have {len(row['prompt_ids'])} tokens, more than "
                    f"{max_prompt_length}; lower the ratio or max_completion_length, or leave such rows out with "
                    "too_long='skip'"
                )
    if not rows:
        raise InvalidDataError(
            f"no problem can be built from {count} traces: {unsolved} without a success, {short} too short to be cut, "
            f"{long} rows too long; collect more samples per problem"
        )
    return PrefixedProblems(rows, unsolved=unsolved, too_short=short, too_long=long)


def _draw_cuts(
    ids: Sequence[int], count: int, low: float, high: float, rng: Random, is_boundary: IsBoundary | None
) -> list[int]:
    """`count` independent cuts, each uniform over the admissible ones; none where there is no admissible one."""
    candidates = [h for h in range(len(ids)) if low <= h / len(ids) <= high]
    if is_boundary is None:
        return rng.choices(candidates, k=count) if candidates else []
    cuts = []
    for _ in range(count):
        shuffled = rng.sample(candidates, len(candidates))  # the first that passes is uniform among those that do
        cuts.append(next((h for h in shuffled if is_boundary(ids, h)), None))
    return [cut for cut in cuts if cut is not None]


# ------------------------------------------------------------------ training


def hooks(config: Config, run: Run) -> dict[str, Any]:
    """What turns `stemma.rl.grpo.Trainer` into PrefixRL, as its keyword arguments: prompts made of the run's traces.

    Raises:
        InvalidDataError: see `build_prefixed_problems`; or an id is outside the model's vocabulary.
    """
    vocab_size = vocabulary_size(run.model)
    for index, trace in enumerate(run.traces):
        outside = [token for token in [*trace.prompt_ids, *trace.trace_ids] if not 0 <= token < vocab_size]
        if outside:
            raise InvalidDataError(
                f"trace {index + 1} holds token id {outside[0]}, outside the model's vocabulary of {vocab_size}; it "
                "was made with another tokenizer"
            )
    positions = max_positions(run.model)
    problems = build_prefixed_problems(
        run.traces,
        cuts_per_problem=config.cuts_per_problem,
        ratio=(config.prefix_ratio_min, config.prefix_ratio_max),
        include_unprefixed=config.include_unprefixed,
        seed=run.options.seed,
        is_boundary=run.is_boundary,
        max_prompt_length=None if positions is None else positions - run.options.max_completion_length,
        too_long=config.too_long,
    )
    found: dict[str, Any] = {"prompts": ShuffledRows(problems, seed=stream_seed(run.options.seed, "prompts"))}
    return found if run.reward is None else {**found, "reward_funcs": rewards_by_kind(run.reward)}


def rewards_by_kind(reward: Reward) -> list[Reward]:
    """The same reward as two functions, for prefixed and for plain problems, whose means the trainer logs apart.

    Each scores its own kind and says None for the other, so their sum is the reward and no completion is scored twice.
    """

    def of_kind(name: str, prefixed: bool) -> Reward:
        def scored(**columns: Sequence[Any]) -> list[float | None]:
            size = len(columns["completions"])
            fractions = columns.get("prefix_fraction") or [None] * size
            own = [i for i, fraction in enumerate(fractions) if bool(fraction) == prefixed]
            values = list(reward(**{key: [column[i] for i in own] for key, column in columns.items()})) if own else []
            if len(values) != len(own):
                raise InvalidDataError(f"{len(values)} values for {len(own)} completions")
            result: list[float | None] = [None] * size
            for i, value in zip(own, values, strict=True):
                result[i] = value
            return result

        scored.__name__ = name
        return scored

    return [of_kind("prefixed", True), of_kind("plain", False)]
