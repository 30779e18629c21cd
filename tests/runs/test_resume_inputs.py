"""A resumed run knows what it was begun with: other data, another model or weights that are not whole are refused."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stemma.cli.main import main
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.train.checkpoint import latest


def stemma(*arguments: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(list(arguments))
    return status, errors.getvalue()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a data set and a run of two steps over them."""
    folder = tmp_path_factory.mktemp("begun")
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What is {n} and one? ####", "answer": str(n + 1)} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, errors = stemma(
        *("train", "--model", str(folder / "model"), "--dataset", str(folder / "data.jsonl")),
        *("--output-dir", str(folder / "run"), "--max-steps", "2", "--save-steps", "1", "--num-generations", "2"),
        *("--per-device-train-batch-size", "2", "--max-completion-length", "3", "--eval-prompts", "2"),
    )
    assert status == 0, errors
    return folder


def grown(folder: Path) -> None:
    with (folder / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more ####", "answer": "5"}) + "\n")


def retrained(folder: Path, path: str = "model/model.safetensors") -> None:
    tensors = load_file(folder / path)
    save_file({name: value + 0.01 for name, value in tensors.items()}, folder / path, metadata={"format": "pt"})


def tokenised_otherwise(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").write_text((folder / "model" / "tokenizer.json").read_text() + " ")


def checkpoint_weights(folder: Path) -> Path:
    found = latest(folder / "run")
    assert found is not None
    return found / "model.safetensors"


def truncated(folder: Path) -> None:
    path = checkpoint_weights(folder)
    path.write_bytes(path.read_bytes()[:-100])


def in_part(folder: Path) -> None:
    path = checkpoint_weights(folder)
    tensors = load_file(path)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def without_digests(folder: Path) -> None:
    (folder / "run" / "inputs.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grown, r"--dataset .*data.jsonl has changed since the run"),
        (retrained, r"--model .*model has changed since the run"),
        (tokenised_otherwise, r"--model .*model has changed since the run"),
        (truncated, r"cannot read the weights in .*checkpoint-000002.*Resume from another checkpoint"),
        (in_part, r"the weights are not whole: model.layers.0.mlp.up_proj.weight are missing"),
        (without_digests, r"cannot read .*inputs.json"),
        (lambda folder: None, None),
    ],
)
def test_resume_knows_contents(
    begun: Path, tmp_path: Path, change: Callable[[Path], None], message: str | None
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(begun, kept)
    try:
        change(begun)
        status, errors = stemma("train", "--resume", "--output-dir", str(begun / "run"))
    finally:  # the paths are part of the settings, so the folder stays where it is
        shutil.rmtree(begun)
        shutil.copytree(kept, begun)
    if message is None:
        assert status == 0, errors
    else:
        assert status != 0
        assert re.search(message, errors.replace("\n", " ")), errors[-600:]
