"""GSM8K: grade-school word problems whose final answer is a number that can be checked.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (arXiv 2110.14168). The files are JSON
Lines with `question` and `answer`; an answer is worked out line by line and ends with a line `#### 72`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from os import PathLike

from stemma.data.records import PromptRecord, read_jsonl, read_prompts, text_field
from stemma.errors import InvalidDataError

__all__ = [
    "Problem",
    "few_shot_prompt",
    "final_answer",
    "final_text",
    "prompt_records",
    "read_answered_prompts",
    "read_problems",
    "reward",
]

# The published answers mark the result with `####`, the published model solutions with `A:`. A line behind the mark
# that begins like a number, or with LaTeX, is the answer.
_FINAL_ANSWER = re.compile(r"^(?:####|A:)\s*([-+−]?\s?[$€£¥]?\s?[-+−]?(?:\.?[0-9]|\\).*)$", re.MULTILINE)
_NUMBER = re.compile(
    r"""(?P<sign>[-+−]?)\s?[$€£¥]?\s?(?P<inner>[-+−]?)
    (?:(?:(?P<whole>[0-9]+)\s+)?(?P<above>[0-9]+)\s?/\s?(?P<below>[0-9]+)
      |(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<power>[-+]?[0-9]{1,3}))?)
    (?P<percent>\s?%)?
    (?P<unit>(?:\s+[A-Za-z]+)*)\s*[.!]?""",
    re.VERBOSE,
)
_SCALES = re.compile(
    r"\b(?:and|or|to|plus|minus|times|by|over|point|e|k|m|bn|percent|per cent|squared|cubed|half|halves|dozens?|scores?"
    r"|quarters?|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty|\w+ths?|thirds?"
    r"|gross|grand|lakhs?|crores?|hundreds?|thousands?|\w*[mbtr]illions?)\b",
    re.IGNORECASE,
)
"""Words behind a number that change it, unlike a unit."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked answer."""

    question: str
    answer: str
    where: str = field(default="", compare=False)
    """File and line that it comes from."""

    @property
    def result(self) -> Fraction:
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
        where = f"{path}, line {number}"
        question, answer = (text_field(path, number, record, name) for name in ("question", "answer"))
        problem = Problem(question, answer, where)
        if final_answer(problem.answer) is None:
            raise InvalidDataError(
                f"{where}: the answer has no final line such as '#### 72', as GSM8K's solutions have; where answers "
                "are numbers alone, name the field of the question 'prompt' and say in it how to write the answer"
            )
        problems.append(problem)
    return problems


def read_answered_prompts(path: str | PathLike[str]) -> list[PromptRecord]:
    """The records of `stemma.data.records.read_prompts`, each with an answer that `reward` can compare with.

    Raises:
        InvalidDataError: names the file and the line; see there, or the answer is missing or holds no number.
    """
    found = read_prompts(path)
    for record in found:
        if record.answer is None:
            raise InvalidDataError(f"{record.where}: no answer to compare with; add a field 'answer'")
        if _reference(record.answer) is None and not _is_latex(record.answer):
            raise InvalidDataError(
                f"{record.where}: the answer {record.answer[-60:]!r} is not a number and has no line such as "
                "'#### 72'; the reward compares final numbers, any other one takes the trainer in Python"
            )
    return found


def final_text(text: str) -> str | None:
    """The answer as it is written: the rest of the first line that starts with `####` or `A:` and goes on like a number
    or with LaTeX; None without one.

    The first such line counts, because a model that has answered may go on and invent the next question.
    """
    match = _FINAL_ANSWER.search(text)
    return None if match is None else match[1].strip()


def final_answer(text: str) -> Fraction | None:
    """The number that `final_text` is, or None: where there is none, or where the line is more than one number.

    Read are signs, currency signs, thousands commas, decimals, exponents (`1e3`), fractions (`3/4`, `2 1/2`) and
    percent (`50%` is 1/2). Words may follow as a unit (`72 dollars in all`) unless they change the number
    (`72 million`).
    """
    written = final_text(text)
    return None if written is None else _number(written)


def _number(text: str) -> Fraction | None:
    """The number that the whole text is; None for any other text, never the number that it begins with."""
    match = _NUMBER.fullmatch(text) if len(text) < 400 else None
    if match is None or _SCALES.search(match["unit"]) or (match["sign"] and match["inner"]):
        return None
    if match["decimal"] is None:
        whole, above, below = (int(match[name] or 0) for name in ("whole", "above", "below"))
        if not below or (match["whole"] is not None and above >= below):
            return None
        value = whole + Fraction(above, below)
    else:
        value = Fraction(Decimal(match["decimal"].replace(",", ""))) * Fraction(10) ** int(match["power"] or 0)
    value /= 100 if match["percent"] else 1
    return -value if (match["sign"] or match["inner"]) in ("-", "−") and value else value


def reward(answer: str, completion: str) -> float:
    """1.0 if the completion's final answer is the same number as the reference answer's, else 0.0.

    Answers in LaTeX (with a backslash, such as `\\frac{1}{2}`) are compared by math-verify, where the extra `math` is
    installed; without it no completion has given them.

    Args:
        answer: a reference, either worked out (ending with `#### 72`) or the number alone (`72`).
        completion: the model's text.

    Raises:
        InvalidDataError: the reference holds no number.
    """
    expected, found = _written(answer), final_text(completion)
    number = _number(expected)
    if number is None and not _is_latex(expected):
        raise InvalidDataError(
            f"the reference answer {answer[-60:]!r} is not a number and has no line such as '#### 72'"
        )
    if found is not None and (_is_latex(expected) or _is_latex(found)):
        return float(_same_latex(expected, found))
    return float(found is not None and _number(found) == number)


def _written(answer: str) -> str:
    """A reference answer as it is written, worked out or alone."""
    return final_text(answer) or answer.strip()


def _reference(answer: str) -> Fraction | None:
    """The number of a reference answer, worked out or alone."""
    return _number(_written(answer))


def _is_latex(text: str) -> bool:
    return "\\" in text and importlib.util.find_spec("math_verify") is not None


def _same_latex(expected: str, found: str) -> bool:
    """Whether math-verify takes the two for the same, each read as one expression."""
    from math_verify import LatexExtractionConfig, parse, verify

    texts = [text.strip("$ .") for text in (expected, found)]
    if any("$" in text for text in texts):
        return False
    return bool(verify(*(parse(f"${text}$", [LatexExtractionConfig()]) for text in texts)))


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
        PromptRecord(prompt=few_shot_prompt(shots, problem.question), answer=problem.answer, where=problem.where)
        for problem in problems
        if problem not in shown
    ]
    if not records:
        raise InvalidDataError(f"all {len(problems)} problems serve as shots; pass more problems or fewer shots")
    return records
