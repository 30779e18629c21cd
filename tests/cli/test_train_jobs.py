"""What `stemma train` trains on: demonstrations of each kind of data set."""

import json
from pathlib import Path
from typing import Any

import pytest

from stemma.cli._train_jobs import Job, _labelled, checkpoint_job, diallock_job
from stemma.data import diallock
from stemma.errors import InvalidDataError
from stemma.models.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def job(model: str, folder: Path, rows: list[dict[str, Any]], **options: Any) -> Job:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return checkpoint_job(model, path, **{"shots": 1, "eval_prompts": 1, "seed": 0, "demonstrations": True} | options)


def demonstrations(found: Job) -> list[str | None]:
    tokenizer, texts = found.processing_class, []
    for row in found.rows:
        ids = row.get("demonstration_ids")
        assert ids is None or (ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1])
        texts.append(None if ids is None else tokenizer.decode(ids[:-1]))
    return texts


def test_gsm8k_demonstrates_its_answers(model: str, tmp_path: Path) -> None:
    rows = [{"question": f"{n} and one?", "answer": f"{n}+1\n#### {n + 1}"} for n in range(6)]
    found = job(model, tmp_path, rows)
    assert set(demonstrations(found)) <= {f" {row['answer']}" for row in rows}
    assert len(found.rows) == 4
    assert all("demonstration_ids" not in row for row in found.eval_rows)
    assert all("demonstration_ids" not in row for row in job(model, tmp_path, rows, demonstrations=False).rows)


def test_prompts_may_have_a_demonstration(model: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n} and one?", "answer": str(n + 1)} for n in range(5)]
    with pytest.raises(
        InvalidDataError, match="demonstrates nothing; add solutions as text in a field 'demonstration'"
    ):
        job(model, tmp_path, rows)
    for row in rows[1:]:
        row["demonstration"] = f"It is {row['answer']}.\n#### {row['answer']}"
    found = job(model, tmp_path, rows, eval_prompts=0)
    expected = {row["prompt"]: f" {row['demonstration']}" if "demonstration" in row else None for row in rows}
    assert demonstrations(found) == [expected[row["prompt"]] for row in found.rows]
    assert None in demonstrations(found)


def test_held_out_rows_are_told_by_their_own_text(model: str, tmp_path: Path) -> None:
    """Whatever the order of the file and whatever lines join it: what was trained on is not held out afterwards."""
    rows = [{"prompt": f"one two {n} ####", "answer": str(n)} for n in range(20)]

    def split(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        found = job(model, tmp_path, rows, eval_prompts=4, demonstrations=False)
        return [row["prompt"] for row in found.eval_rows], [row["prompt"] for row in found.rows]

    held_out, asked = split(rows)
    assert len(held_out) == 4
    assert sorted(held_out + asked) == sorted(row["prompt"] for row in rows)
    assert split(rows[::-1]) == (held_out, asked)
    for n in range(8):
        assert not set(split([*rows, {"prompt": f"new {n}", "answer": "5"}])[0]) & set(asked)
    # A prompt that stands in the file several times is on one side only.
    again, others = split([*rows, *rows])
    assert not set(again) & set(others)
    assert set(again) <= set(held_out)


def test_the_embedded_task_demonstrates_shortest_solutions() -> None:
    common: dict[str, Any] = {"shots": 1, "sft_steps": 0, "eval_prompts": 2, "seed": 1}
    found = diallock_job(**common, demonstrations=True)
    rows = found.prompts(0, 8)
    for row in rows:
        assert diallock.reward(row["prompt_ids"], row["demonstration_ids"], slack=0) == 1.0
    assert found.prompts(0, 8) == rows
    assert all("demonstration_ids" not in row for row in diallock_job(**common).prompts(0, 8))


def test_answers_to_learn_from_need_an_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidDataError, match="no eos_token_id"):
        _labelled(tokenizer, [[("1+1=", "2")]])
