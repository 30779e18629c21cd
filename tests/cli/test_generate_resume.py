"""`stemma generate` in batches: what is written when, interruption, and files and folders that are in the way."""

import json
import os
import shlex
import signal

import pytest

import stemma
from stemma.cli.main import main

BATCHES = [["--batch-size=2"], ["--batch-size=2", "--temperature=1", "--num-return-sequences=2", "--top-k=50"]]


@pytest.fixture
def arguments(folder, tmp_path):
    lines = [{"prompt": f"prompt number {number}"} for number in range(5)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = tmp_path / "new" / "out.jsonl"
    return ["generate", str(folder), f"--prompts={prompts}", f"--output={output}", "--max-new-tokens=4"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "out.jsonl"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def failing(monkeypatch, call, action):
    """Let `action` happen before a call of `stemma.generate`, counted from 1; the list of all calls."""
    generate, calls = stemma.generate, []

    def watched(*given, **options):
        calls.append(len(given[2]))
        if len(calls) == call:
            action()
        return generate(*given, **options)

    monkeypatch.setattr(stemma, "generate", watched)
    return calls


@pytest.mark.parametrize("flags", BATCHES, ids=["greedy", "sampled"])
def test_ctrl_c_stops_after_the_batch_and_resume_goes_on_to_the_same_file(
    arguments, flags, output, capsys, monkeypatch
):
    assert main([*arguments, *flags]) == 0
    expected = output.read_bytes()
    assert names(output.parent) == ["out.jsonl"]
    output.unlink()

    with monkeypatch.context() as patch:
        calls = failing(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        capsys.readouterr()
        assert main([*arguments, *flags, "--json"]) == 130
        assert calls == [2, 2]
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["status"], report["exit_status"]) == ("interrupted", 130)
    assert "stopped by SIGINT before all 5 prompts. Go on with: stemma generate" in captured.err
    assert names(output.parent) == [".out.jsonl.partial"]
    partial = (output.parent / ".out.jsonl.partial").read_bytes().partition(b"\n")[2]
    assert partial == b"".join(expected.splitlines(True)[: partial.count(b"\n")])
    assert len(report["generations"]) == partial.count(b"\n") == 4 * len(expected.splitlines()) // 5

    assert main([*arguments, *flags]) == 1  # not without --resume
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*arguments, *flags, "--resume", "--seed=7"]) == 1
    assert "seed is 0 in the unfinished" in capsys.readouterr().err
    assert main([*arguments, *flags, "--resume", "--batch-size=3"]) == 1
    assert "batch_size is 2 in the unfinished" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        calls = failing(patch, 0, lambda: None)
        assert main(shlex.split(report["resume_with"])[1:]) == 0
        assert calls == [1]
    assert output.read_bytes() == expected
    assert names(output.parent) == ["out.jsonl"]
    assert main([*arguments, *flags, "--resume"]) == 1
    assert "is finished" in capsys.readouterr().err


def test_a_batch_that_a_kill_cut_off_is_done_again(arguments, output, monkeypatch):
    flags = BATCHES[1]
    assert main([*arguments, *flags]) == 0
    expected = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        failing(patch, 3, lambda: {}["killed"])
        with pytest.raises(KeyError, match="killed"):
            main([*arguments, *flags])
    partial = output.parent / ".out.jsonl.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-20])
    calls = failing(monkeypatch, 0, lambda: None)
    assert main([*arguments, *flags, "--resume"]) == 0
    assert calls == [2, 1]
    assert output.read_bytes() == expected


def test_samples_of_a_batch_do_not_depend_on_those_before(arguments, output, tmp_path):
    flags = BATCHES[1]
    assert main([*arguments, *flags]) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in range(5) for s in range(2)]
    # The same prompt in each batch: other samples, as each batch has a stream of its own.
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "same"}\n' * 4, encoding="utf-8")
    output.unlink()
    assert main([*arguments, *flags]) == 0
    ids = [json.loads(line)["token_ids"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert ids[:4] != ids[4:]


def test_batches_go_to_standard_output_as_they_are_done(arguments, capsys, monkeypatch):
    printed = []
    failing(monkeypatch, 2, lambda: printed.append(capsys.readouterr().out))
    assert main([word for word in [*arguments, "--batch-size=2"] if not word.startswith("--output")]) == 0
    assert printed[0].count("\n") == 2


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(arguments, output, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stemma.models.loading.load_model", lambda *given, **options: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "prefix.txt").write_text("a", encoding="utf-8")
    prefix = f"--prefix={tmp_path / 'prefix.txt'}"
    for flags, words in (
        ([f"--output={tmp_path}"], "is a folder; give the path of a file"),
        ([f"--output={tmp_path / 'file'}"], "exists; choose another --output"),
        ([f"--output={tmp_path / 'file' / 'out.jsonl'}"], "cannot write"),
        (["--resume"], "there is no generation to resume"),
        ([prefix, f"--save-prefix={tmp_path / 'full'}"], "exists; read it with --prefix"),
        ([prefix, f"--save-prefix={tmp_path / 'file'}"], "exists; read it with --prefix"),
        ([prefix, f"--save-prefix={tmp_path / 'file' / 'below'}"], "cannot write"),
    ):
        assert main([*arguments, *flags]) == 1
        assert words in capsys.readouterr().err
    assert names(output.parent) == []


def test_nothing_is_left_of_a_failure(arguments, output, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt_ids": [5]}\n{"prompt_ids": [999]}\n', encoding="utf-8")
    assert main([*arguments, "--batch-size=1"]) == 1  # before the first batch
    assert "line 2: has token id 999, outside the vocabulary" in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_ids": [5] * 510}), encoding="utf-8")
    assert main(arguments) == 1
    assert "exceeds the model's 512 positions" in capsys.readouterr().err
    assert names(output.parent) == []


def test_resume_may_find_its_saved_prefix(arguments, output, tmp_path, monkeypatch):
    (tmp_path / "prefix.txt").write_text("a document. ", encoding="utf-8")
    flags = ["--batch-size=2", f"--prefix={tmp_path / 'prefix.txt'}", f"--save-prefix={tmp_path / 'encoded'}"]
    with monkeypatch.context() as patch:
        failing(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*arguments, *flags]) == 143
    assert main([*arguments, *flags, "--resume"]) == 0
    assert names(tmp_path / "encoded") == ["prefix.json", "prefix.safetensors"]
    assert len(output.read_text(encoding="utf-8").splitlines()) == 5


def test_another_model_in_the_same_folder_is_not_gone_on_with(arguments, folder, output, capsys, monkeypatch):
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main([*arguments, "--batch-size=2"]) == 130
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        assert main([*arguments, "--batch-size=2", "--resume"]) == 1
    finally:
        weights.write_bytes(kept)
    assert "the digest of the model's files is" in capsys.readouterr().err
    assert main([*arguments, "--batch-size=2", "--resume"]) == 0
