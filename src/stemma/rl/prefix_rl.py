"""PrefixRL: reinforcement learning on hard problems that begins where an earlier success left off.

What for: where a problem is never solved, every reward is 0 and there is nothing to learn from. One correct solution of
it, found by long rejection sampling or by another model, is cut off part of the way and given to the policy as context:
from there it succeeds often enough to learn, and what it learns carries over to the problem without the prefix.

Source: "Reuse your FLOPs: Scaling RL on Hard Problems by Conditioning on Very Off-Policy Prefixes", 2026, arXiv
2601.18795. With one verified trace ``y_x`` (`Trace.trace_ids`) for each hard problem ``x`` (`Trace.prompt_ids`), drawn
once and then frozen:

    D_pre: for each x, 3 (`cuts_per_problem`) prefixed problems x ⊕ y_x[:h],  h ~ U(0.4, 0.8) |y_x|  (`ratio`)
    max    Σ_{D_pre} E_{y ~ π(· | x ⊕ y_x[:h])} r(x, y_x[:h] ⊕ y)  +  Σ_D E_{y ~ π(· | x)} r(x, y)             (Eq. 3.1)

sampled uniformly over the union, so 3 prefixed problems to 1 plain one. The prefix is part of the prompt
(`prompt_ids`), so it gets no gradient and no importance weight, and a group never mixes prefixes; the verifier sees it
as the beginning of the completion (`prefix_ids`). The policy gradient has the group's mean as its baseline: train with
`grpo.Config(scale_rewards="none")`, as `Config.grpo_options` says. Evaluate without prefixes.

What we changed: ``h`` is uniform over the whole numbers of tokens within the ratio, so that it never leaves it; cuts
can be restricted to boundaries; traces are kept as token ids from sampling to training. We estimate sampling at 2ND
operations as the paper does, with D all sampled tokens and each prompt once per round.

Relations: a choice of prompts alone, so any rollout, credit (such as the tree credit of TEMPO) and loss of the trainer
goes with it. Prefix-RFT trains on its prefixes, PrefixRL never does. The shared forward encodes problem and prefix once
per group.

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

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from random import Random
from typing import Any, overload

from torch import nn

from stemma.data.traces import Trace, TraceFile
from stemma.decode.rollout import Generator, LocalGenerator
from stemma.errors import InvalidDataError
from stemma.models.limits import max_positions, vocabulary_size
from stemma.rl.engine.hooks import Reward, Row, ShuffledRows, end_token_ids, sample
from stemma.rl.engine.options import Config as TrainerConfig
from stemma.rl.engine.options import PrefixRLConfig as Config
from stemma.rl.engine.options import TooLong
from stemma.rl.engine.rewards import score_completions
from stemma.train.seeds import stream_seed

__all__ = ["Config", "PrefixedProblems", "build_prefixed_problems", "collect_traces", "hooks", "rewards_by_kind"]

IsBoundary = Callable[[Sequence[int], int], bool]
"""``is_boundary(trace_ids, h)``: whether a prefix may end before position ``h``."""


# ------------------------------------------------------------------ traces


def collect_traces(
    model: nn.Module,
    problems: Sequence[Row],
    verify: Reward,
    *,
    processing_class: Any,
    max_completion_length: int,
    generator: Generator | None = None,
    temperature: float = 1.0,
    samples_per_round: int = 64,
    max_samples: int = 2500,
    seed: int = 0,
    source: str = "rejection sampling",
    path: str | PathLike[str] | None = None,
    on_trace: Callable[[Trace], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Trace]:
    """Sample each problem until the first verified success, or until `max_samples` completions have failed.

    Problems are taken one after the other, in rounds; the seed of a round depends on the index of the problem and the
    number of the round, so an interrupted collection goes on to the same file as one that ran through.

    Args:
        model: the policy, usually the base model.
        problems: rows without a prefix; their other columns go into the traces.
        verify: a reward function; 1 (or more) is a success. A completion that was cut off never is one.
        processing_class: the tokenizer; it decodes completions for `verify`.
        max_completion_length: tokens after which a completion is cut off.
        generator: samples the completions; the model itself, on this machine, when None.
        temperature: sampling temperature where no generator is given.
        samples_per_round: completions of a problem that are sampled together, >= 1.
        max_samples: completions after which a problem is given up, >= 1. The paper: 2,500, and about 650 on average.
        seed: decides every sample.
        source: what the traces say about their origin; a resumed collection must say the same.
        path: the JSON Lines file to write (see `stemma.data.traces`) and, where it has lines already, to go on with.
            None keeps traces in memory only.
        on_trace: called with each new trace, solved or given up.
        should_stop: asked before each round; once it says yes, the traces so far are returned. The problem at hand
            starts again when resumed.

    Returns:
        One trace per problem, in their order, fewer after a stop; a problem that was given up has no `trace_ids`.

    Raises:
        ValueError: a number is below 1.
        InvalidDataError: a problem has a prefix, the reward function fails, or the file belongs to other problems or
            another source.
    """
    for name, value in (("samples_per_round", samples_per_round), ("max_samples", max_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if generator is None:
        generator = LocalGenerator(eos_token_id=end_token_ids(model, processing_class), temperature=temperature)
    decode: Callable[[list[int]], str] = partial(processing_class.decode, skip_special_tokens=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with nullcontext() if path is None else TraceFile(path) as file:
        traces: list[Trace] = [] if file is None else list(file.traces[: len(problems)])
        for index, trace in enumerate(traces):
            _check_resumed(f"{path}, trace {index + 1}", trace, problems[index], source)
        for index in range(len(traces), len(problems)):
            row, samples, tokens, prompt_tokens = problems[index], 0, 0, 0
            if row.get("prefix_ids"):
                raise InvalidDataError(f"problem {index} has prefix_ids; collect traces of whole problems")
            found: list[int] = []
            while not found and samples < max_samples:
                if should_stop():
                    return traces
                size = min(samples_per_round, max_samples - samples)
                round_seed = stream_seed(seed, "traces", index, samples // samples_per_round)
                batch = sample(model, generator, max_completion_length, [row["prompt_ids"]], size, [round_seed])
                (rewards,) = score_completions([verify], [row], batch, decode)
                completions = batch.completions()
                samples, tokens = samples + size, tokens + sum(map(len, completions))
                prompt_tokens += len(row["prompt_ids"])
                for ids, reward, cut_off in zip(completions, rewards, batch.truncated.tolist(), strict=True):
                    if reward is not None and reward >= 1 and not cut_off:
                        found = ids
                        break
            trace = Trace(
                prompt_ids=list(row["prompt_ids"]),
                trace_ids=found,
                verified=bool(found),
                text=decode(found) if found else None,
                source=source,
                samples=samples,
                tokens=tokens,
                flops=2.0 * parameters * (prompt_tokens + tokens),
                columns={name: value for name, value in row.items() if name != "prompt_ids"},
            )
            traces.append(trace)
            if file is not None:
                file.append(trace)
            if on_trace is not None:
                on_trace(trace)
    return traces


def _check_resumed(where: str, trace: Trace, problem: Row, source: str) -> None:
    if trace.prompt_ids != list(problem["prompt_ids"]):
        raise InvalidDataError(f"{where} is of another problem than the one at its place; choose another file")
    if trace.source != source:
        raise InvalidDataError(
            f"{where} was collected with other settings: '{trace.source}', not '{source}'; repeat those settings, or "
            "choose another file"
        )


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


def hooks(
    config: Config,
    trainer: TrainerConfig,
    *,
    traces: Sequence[Trace],
    model: nn.Module,
    is_boundary: IsBoundary | None = None,
) -> dict[str, Any]:
    """What turns `stemma.rl.grpo.Trainer` into PrefixRL, as its keyword arguments: its prompts.

    Args:
        config: see `Config`.
        trainer: the options of the trainer; `scale_rewards="none"` is the paper's.
        traces, is_boundary: see `build_prefixed_problems`.
        model: the policy. Its vocabulary holds every id of the traces; its context holds prompts and completions.

    Raises:
        InvalidDataError: see `build_prefixed_problems`; or an id is outside the model's vocabulary.
    """
    vocab_size = vocabulary_size(model)
    for index, trace in enumerate(traces):
        outside = [token for token in [*trace.prompt_ids, *trace.trace_ids] if not 0 <= token < vocab_size]
        if outside:
            raise InvalidDataError(
                f"trace {index + 1} holds token id {outside[0]}, outside the model's vocabulary of {vocab_size}; it "
                "was made with another tokenizer"
            )
    positions = max_positions(model)
    problems = build_prefixed_problems(
        traces,
        cuts_per_problem=config.cuts_per_problem,
        ratio=(config.prefix_ratio_min, config.prefix_ratio_max),
        include_unprefixed=config.include_unprefixed,
        seed=trainer.seed,
        is_boundary=is_boundary,
        max_prompt_length=None if positions is None else positions - trainer.max_completion_length,
        too_long=config.too_long,
    )
    return {"prompts": ShuffledRows(problems, seed=stream_seed(trainer.seed, "prompts"))}


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
