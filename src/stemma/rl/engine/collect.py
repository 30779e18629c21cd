"""Collecting verified solutions of problems by rejection sampling, to be trained on or to begin with later."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from stemma.data.traces import Trace, TraceFile
from stemma.decode.rollout import Generator, LocalGenerator
from stemma.errors import InvalidDataError
from stemma.rl.engine.hooks import Reward, Row, end_token_ids, sample
from stemma.rl.engine.rewards import score_completions
from stemma.train.seeds import stream_seed

__all__ = ["collect_traces"]


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
        verify: a reward function; 1 (or more) is a success, also of a completion that was cut off.
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
                for ids, reward in zip(completions, rewards, strict=True):
                    if reward is not None and reward >= 1:
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
