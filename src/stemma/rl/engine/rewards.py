"""Rewards of a batch of completions: reward functions called once for all, their answers checked."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stemma.errors import InvalidDataError
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Reward, Row

__all__ = ["question_and_beginning", "score_completions"]


def score_completions(
    rewards: Sequence[Reward], rows: Sequence[Row], batch: RolloutBatch, decode: Callable[[list[int]], str]
) -> list[list[float | None]]:
    """The value of every reward function for every completion.

    Args:
        rewards: reward functions, called with one entry per completion in every argument; async ones are awaited.
        rows: one row per prompt of the batch. The `prefix_ids` of a row count as the beginning of its completions.
        decode: token ids to text.

    Returns:
        Per function, N values; None where it cannot score the completion.

    Raises:
        InvalidDataError: a function raised, or returned something else than a list, the wrong number of values, NaN, an
            infinity or something that is no number. The message names the function, and the sample where it is one.
    """
    group = batch.group_id.tolist()
    asked, begun = zip(*map(question_and_beginning, rows), strict=True)
    completion_ids = [begun[g] + ids for g, ids in zip(group, batch.completions(), strict=True)]
    prompts = [str(row["prompt"]) if "prompt" in row else decode(ids) for row, ids in zip(rows, asked, strict=True)]
    arguments: dict[str, list[Any]] = {
        "prompts": [prompts[g] for g in group],
        "completions": [decode(ids) for ids in completion_ids],
        "completion_ids": completion_ids,
        "prompt_ids": [asked[g] for g in group],
    }
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("prompt", *arguments)):
        arguments[name] = [rows[g].get(name) for g in group]
    return [_call_reward(function, arguments) for function in rewards]


def question_and_beginning(row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row's question, and of the beginning of its answer."""
    prompt, prefix = list(row["prompt_ids"]), list(row.get("prefix_ids") or [])
    if prefix and (prompt[-len(prefix) :] != prefix or len(prefix) == len(prompt)):
        raise InvalidDataError(
            f"prefix_ids of {len(prefix)} tokens are not the tail of the row's {len(prompt)} prompt_ids; a prefixed "
            "prompt is the question's token ids followed by those of the prefix"
        )
    return prompt[: len(prompt) - len(prefix)], prefix


def _call_reward(function: Reward, arguments: dict[str, list[Any]]) -> list[float | None]:
    name, expected = getattr(function, "__name__", type(function).__name__), len(arguments["completions"])
    wanted = f"return a list of {expected} finite numbers, one for each completion (None where it cannot be scored)"
    try:
        returned: Any = function(**arguments)
        if inspect.isawaitable(returned):
            with ThreadPoolExecutor(1) as pool:  # a thread of its own: the caller's may run an event loop (notebooks)
                returned = pool.submit(asyncio.run, _result_of(returned)).result()
        single = isinstance(returned, str | bytes | Mapping | Set) or getattr(returned, "ndim", 1) == 0
        values = None if single or not isinstance(returned, Iterable) else list(returned)
    except Exception as error:
        raise InvalidDataError(f"reward function '{name}' raised {type(error).__name__}: {error}; {wanted}") from error
    if values is None:
        raise InvalidDataError(f"reward function '{name}' returned a value of type {type(returned).__name__}; {wanted}")
    if len(values) != expected:
        raise InvalidDataError(
            f"reward function '{name}' returned {len(values)} values for {expected} completions; {wanted}"
        )
    result: list[float | None] = []
    for index, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, str | bytes) else None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise InvalidDataError(
                f"reward function '{name}' returned {value!r} for {_sample(arguments, index)}; {wanted}"
            )
        result.append(number)
    return result


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _sample(arguments: dict[str, list[Any]], index: int) -> str:
    prompt = arguments["prompts"][index]
    return f"sample {index} (prompt ends {prompt[-40:]!r}, completion {arguments['completions'][index][:80]!r})"
