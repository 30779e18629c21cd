"""GSM8K: grade-school word problems whose final answer is a number that can be checked.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (arXiv 2110.14168). The files are JSON
Lines with `question` and `answer`; an answer is worked out line by line and ends with a line `#### 72`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from os import PathLike

from stemma.data.records import PromptRecord, read_jsonl, read_prompts, text_field
from stemma.errors import InvalidDataError

# The published answers mark the result with `####`, the published model solutions with `A:`. What follows the number
# must not go on as a longer number or a fraction.
_FINAL_ANSWER = re.compile(r"^(?:####|A:)\s*\$?\s*(-?[\d,]*\.?\d+)(?![\d/])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked answer."""

    question: str
    answer: str

    @property
    def result(self) -> Decimal:
        """The number the answer ends with."""
        number = final_answer(self.answer)
        if number is None:
            raise InvalidDataError(f"the answer {self.answer[-60:]!r} has no line such as '#### 72'")
        return number


def read_problems(path: str | PathLike[str]) -> list[Problem]:
    """The problems of a GSM8K file.

    Raises:
        InvalidDataError: names the file and the line that is not JSON, lacks a field, or whose answer has no number.
    """
    problems = []
    for number, record in read_jsonl(path):
        problem = Problem(*(text_field(path, number, record, name) for name in ("question", "answer")))
        if final_answer(problem.answer) is None:
            raise InvalidDataError(f"{path}, line {number}: the answer has no final line such as '#### 72'")
        problems.append(problem)
    return problems


def read_answered_prompts(path: str | PathLike[str]) -> list[PromptRecord]:
    """The records of `stemma.data.records.read_prompts`, each with an answer that `reward` can compare with.

    Raises:
        InvalidDataError: names the file and the line; see there, or the answer is missing or holds no number.
    """
    found = read_prompts(path)
    for (number, _), record in zip(read_jsonl(path), found):
        if record.answer is None:
            raise InvalidDataError(f"{path}, line {number}: no answer to compare with; add a field 'answer'")
        if _reference(record.answer) is None:
            raise InvalidDataError(
                f"{path}, line {number}: the answer {record.answer[-60:]!r} is not a number and has no line such as "
                "'#### 72'; the reward compares final numbers, any other one takes the trainer in Python"
            )
    return found


def final_answer(text: str) -> Decimal | None:
    """The number on the first line that starts with `####` or `A:`, or None.

    A dollar sign and thousands commas are ignored. The first such line counts, because a model that has answered may go
    on and invent the next question.
    """
    match = _FINAL_ANSWER.search(text)
    return None if match is None else Decimal(match.group(1).replace(",", ""))


def reward(answer: str, completion: str) -> float:
    """1.0 if the completion's final answer is the same number as the reference answer's, else 0.0.

    Args:
        answer: a reference, either worked out (ending with `#### 72`) or the number alone (`72`).
        completion: the model's text.

    Raises:
        InvalidDataError: the reference holds no number.
    """
    expected = _reference(answer)
    if expected is None:
        raise InvalidDataError(
            f"the reference answer {answer[-60:]!r} is not a number and has no line such as '#### 72'"
        )
    return float(final_answer(completion) == expected)


def _reference(answer: str) -> Decimal | None:
    """The number of a reference answer, worked out or alone."""
    number = final_answer(answer)
    return final_answer(f"#### {answer.strip()}") if number is None else number


def few_shot_prompt(shots: Sequence[Problem], question: str) -> str:
    """Solved problems, then the question to answer: `Question: …`, `Answer: …`, a blank line between problems.

    The prompt ends with `Answer:`, so a completion starts with a space. Prompts built from the same shots share all
    text up to the last question.
    """
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{solved}Question: {question}\nAnswer:"


def prompt_records(problems: Sequence[Problem], shots: Sequence[Problem] = ()) -> list[PromptRecord]:
    """Every problem as a few-shot prompt with its reference answer; shots are never asked themselves.

    Raises:
        InvalidDataError: no problem is left.
    """
    shown = set(shots)
    records = [
        PromptRecord(prompt=few_shot_prompt(shots, problem.question), answer=problem.answer)
        for problem in problems
        if problem not in shown
    ]
    if not records:
        raise InvalidDataError(f"all {len(problems)} problems serve as shots; pass more problems or fewer shots")
    return records
