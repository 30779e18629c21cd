import json
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.data import gsm8k
from stemma.data.gsm8k import Problem
from stemma.data.records import read_jsonl
from stemma.errors import InvalidDataError

DATA = Path(os.environ.get("STEMMA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"needs the GSM8K files in {DATA} (set STEMMA_DATA to the folder above gsm8k/)"
)
NATALIA = Problem("How many clips?", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72")


_UNREADABLE = [
    *("10:30", "1:2", "5 billion", "5 feet 6", "6 out of 10", "3 or 4", "5 and a half", "7 thousandths", "2 dozen"),
    *("1/0", "2 3/2", "1,00", "12,34,567", "1.2.3", "--5", "-$-5", "10-30", "3x", "½", "2½", "5万", "٣", "1e9999"),
    *("5 ^ 2", "2 + 3", "4 = 4", "10m", "9" * 5000, "1/3/5", "1 2", "(5)", "5 %%", "1_000", "0x10", "1e", "5 fifty"),
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("work\n#### 72", "72"),
        ("work\nA: 18", "18"),
        ("####  $1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### .5", "0.5"),
        ("A:$ 10.50 in all", "10.5"),
        ("#### 7.", "7"),
        ("#### 1\n#### 2", "1"),
        ("#### 3/4", "0.75"),
        ("#### 13/4.", "3.25"),
        ("#### 2 1/2", "2.5"),
        ("#### -2 1/2", "-2.5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### −5", "-5"),
        ("#### 1e3", "1000"),
        ("#### 1.5E-2", "0.015"),
        ("#### $1,000.50", "1000.5"),
        ("#### 50%", "0.5"),
        ("#### 72 dollars.", "72"),
        ("A: she had some\n#### 6", "6"),
        ("A: 5 of 9 are left\n#### 4", None),
        ("####\n72", "72"),
        *((f"#### {text}", None) for text in _UNREADABLE),
        ("the answer is 72", None),
        ("so A: 72", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_answer(text, number):
    assert gsm8k.final_answer(text) == (None if number is None else Decimal(number))


numbers = st.integers(-(10**12), 10**12) | st.decimals(-(10**9), 10**9, places=4) | st.fractions(max_denominator=99)
prints = [str, "{:,}".format, "{:e}".format, "${}".format, "{} apples".format, "{}.".format, "{:.3f}".format]


def printed(number, form):
    """A number as one of the forms prints it; fractions have one form only."""
    return str(number) if isinstance(number, Fraction) else form(number)


@given(numbers, st.sampled_from(prints))
def test_a_printed_number_round_trips(number, form):
    text = printed(number, form)
    expected = Fraction(text.strip("$. aples").replace(",", ""))
    assert gsm8k.final_answer(f"work\n#### {text}\n#### 1") == expected
    assert gsm8k.reward(text, f"#### {text}") == 1.0
    assert gsm8k.reward(text, f"#### {expected + 1}") == 0.0


_WORDS = (*":-x", "and", "or", "to", "of", "billion")
_BETWEEN = [*":-+*^=x;|~<>'", "..", "...", ", ", *(f" {word} " for word in _WORDS)]


@given(numbers, numbers, st.sampled_from(_BETWEEN), st.sampled_from(prints))
def test_two_numbers_are_never_read_as_one(first, second, between, form):
    text = f"{printed(first, form)}{between}{printed(second, form)}"
    assert gsm8k.final_answer(f"#### {text}") is None
    with pytest.raises(InvalidDataError):
        gsm8k.reward(text, "#### 1")


@given(st.text("0123456789.,/%eE-+−$: ", max_size=12))
def test_what_is_read_is_the_whole_text(text):
    found = gsm8k.final_answer(f"#### {text}")
    if found is not None:
        bare = re.sub(r"[$\s]|(?<!\d)\+", "", text.replace("−", "-").strip().removesuffix(".")).replace(",", "")
        mixed = re.fullmatch(r"[-+$−\s]*(\d+)\s+(\d+)\s?/\s?(\d+)\s*%?\s*\.?\s*", text)
        value = (
            abs(Fraction(bare.removesuffix("%")))
            if mixed is None
            else int(mixed[1]) + Fraction(*map(int, mixed.group(2, 3)))
        )
        assert abs(found) == value / (100 if "%" in text else 1)
        assert found <= 0 if bare.startswith("-") else found >= 0


def test_latex_is_compared_by_math_verify():
    pytest.importorskip("math_verify", reason="needs the extra: pip install 'stemma-lm[math]'")
    half = r"\frac{1}{2}"
    for answer, completion, right in [
        ("0.5", f"#### {half}", 1.0),
        ("1/2", rf"#### ${half}$.", 1.0),
        (half, "#### 50%", 1.0),
        (half, "#### 2", 0.0),
        (half, rf"#### {half} or 3", 0.0),
        (r"2\sqrt{3}", r"#### \sqrt{12}", 1.0),
    ]:
        assert gsm8k.reward(answer, completion) == right, completion


def test_reward_compares_numbers():
    assert gsm8k.reward(NATALIA.answer, " 48/2 + 48 = 72\n#### 72.0") == 1.0
    assert gsm8k.reward("72", "A: $72") == 1.0
    assert gsm8k.reward("1,000", "#### 1000") == 1.0
    assert gsm8k.reward(NATALIA.answer, "#### 24\n#### 72") == 0.0
    assert gsm8k.reward(NATALIA.answer, "72") == 0.0
    assert gsm8k.reward(NATALIA.answer, "") == 0.0
    with pytest.raises(InvalidDataError, match="seventy-two"):
        gsm8k.reward("seventy-two", "#### 72")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "line 3: no answer to compare with; add a field 'answer'"),
        ({"prompt": "a", "answer": "four"}, "line 3: the answer 'four' is not a number"),
        ({"answer": "4"}, "line 3: field 'prompt' is missing"),
    ],
)
def test_prompts_need_an_answer_that_the_reward_can_compare(tmp_path, record, message):
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": "a", "answer": answer}) for answer in ("1,000", "2 + 2\n#### 4")]
    file.write_text("\n\n".join(lines))  # a blank line counts as a line
    assert [gsm8k.reward(record.answer, "#### 4") for record in gsm8k.read_answered_prompts(file)] == [0.0, 1.0]
    file.write_text(f"{lines[0]}\n\n{json.dumps(record)}")
    with pytest.raises(InvalidDataError, match=message):
        gsm8k.read_answered_prompts(file)


def test_few_shot_prompts_share_everything_up_to_the_question():
    other = Problem("And now?", "Nothing.\n#### 0")
    prompt = gsm8k.few_shot_prompt([NATALIA, other], "Last?")
    assert prompt == (
        "Question: How many clips?\nAnswer: Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72\n\n"
        "Question: And now?\nAnswer: Nothing.\n#### 0\n\nQuestion: Last?\nAnswer:"
    )
    assert gsm8k.few_shot_prompt([], "Last?") == "Question: Last?\nAnswer:"
    records = gsm8k.prompt_records([NATALIA, other], shots=[NATALIA])
    assert [(record.prompt, record.answer) for record in records] == [
        (gsm8k.few_shot_prompt([NATALIA], other.question), other.answer)
    ]
    with pytest.raises(InvalidDataError, match="serve as shots"):
        gsm8k.prompt_records([NATALIA], shots=[NATALIA])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, "line 2: field 'answer' is missing"),
        ({"question": "", "answer": "#### 1"}, "line 2: field 'question' is blank"),
        ({"question": "a", "answer": "one"}, "line 2: the answer has no final line"),
    ],
)
def test_a_bad_problem_is_named_with_its_line(tmp_path, record, message):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n" + json.dumps(record))
    with pytest.raises(InvalidDataError, match=rf"problems\.jsonl, {message}"):
        gsm8k.read_problems(file)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_every_published_problem_is_read(name, count):
    problems = gsm8k.read_problems(DATA / f"{name}.jsonl")
    assert len(problems) == count
    for problem in problems:
        written = problem.answer.rsplit("####", 1)[1].strip()
        assert problem.answer.count("####") == 1
        assert problem.result == int(written.replace(",", ""))
        assert gsm8k.reward(problem.answer, f" Some work.\n#### {problem.result}") == 1.0
        assert gsm8k.reward(problem.answer, f" Some work.\n#### {problem.result + 1}") == 0.0


@needs_data
def test_reward_agrees_with_every_published_label():
    agreed, mixed = [], 0
    for _, record in read_jsonl(DATA / "example_model_solutions.jsonl"):
        solutions = [value for value in record.values() if isinstance(value, dict)]
        labels = [solution["is_correct"] for solution in solutions]
        agreed += [
            bool(gsm8k.reward(record["ground_truth"], solution["solution"])) == label
            for solution, label in zip(solutions, labels)
        ]
        mixed += 0 < sum(labels) < len(labels)
    assert len(agreed) == 5276
    assert all(agreed)
    assert mixed == 731


@needs_data
def test_an_eight_shot_prompt_is_long_and_mostly_shared():
    problems = gsm8k.read_problems(DATA / "train.jsonl")
    records = gsm8k.prompt_records(problems[:50], shots=problems[:8])
    assert len(records) == 42
    prompts = [record.prompt for record in records]
    header = gsm8k.few_shot_prompt(problems[:8], "").removesuffix("\nAnswer:")
    assert all(prompt.startswith(header) for prompt in prompts)
    assert len(header) > 0.8 * sum(map(len, prompts)) / len(prompts)
