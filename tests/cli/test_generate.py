"""`stemma generate`: lines as from transformers' generate, prompts of all kinds, refusals with the line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from stemma.cli.generate import Config, read_prompts
from stemma.cli.main import main
from stemma.errors import InvalidDataError
from stemma.models.tiny import byte_tokenizer, tiny_model


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_those_of_transformers(folder, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "shared words, one"}, {"prompt_ids": list(b"shared words")})
    output = tmp_path / "new" / "out.jsonl"
    common = ["generate", str(folder), "--prompts", str(prompts), "--max-new-tokens", "6", "--share", "always"]
    assert main([*common, "--output", str(output), "--report"]) == 0
    assert "shared run" in capsys.readouterr().err
    model = tiny_model(seed=4)
    for line, text in zip(lines(output), ("shared words, one", "shared words"), strict=True):
        ids = torch.tensor([list(text.encode())])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=257)[0, ids.shape[1] :].tolist()
        assert line["token_ids"] == expected
        assert line["text"] == byte_tokenizer().decode(expected, skip_special_tokens=True)

    assert main([*common, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [line["token_ids"] for line in result["generations"]] == [line["token_ids"] for line in lines(output)]
    assert result["report"]["rows"] == 2


def test_a_prefix_goes_before_all_prompts_and_seeds_repeat(folder, tmp_path):
    def run(name, records, *flags):
        output = tmp_path / f"{name}.jsonl"
        output.unlink(missing_ok=True)
        prompts = write(tmp_path / "prompts.jsonl", *records)
        flags = ["--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "5", *flags]
        assert main(["generate", str(folder), *flags]) == 0
        return [line["token_ids"] for line in lines(output)]

    prefix = tmp_path / "prefix.txt"
    prefix.write_text("what all begin with. ", encoding="utf-8")
    whole = [{"prompt": "what all begin with. A"}, {"prompt": "what all begin with. B"}]
    rest = [{"prompt": "A"}, {"prompt": "B"}]
    assert run("prefix", rest, "--prefix", str(prefix)) == run("whole", whole)
    encoded = str(tmp_path / "encoded")
    run("saved", rest, "--prefix", str(prefix), "--save-prefix", encoded)
    prefix.unlink()
    as_ids = [{"prompt_ids": list(record["prompt"].encode())} for record in rest]
    assert run("loaded", as_ids, "--prefix", encoded) == run("whole", whole)
    messages = write(tmp_path / "messages.jsonl", {"messages": [{"role": "user", "content": "A"}]})
    assert main(["generate", str(folder), "--prompts", str(messages), "--prefix", encoded]) == 1
    assert main(["generate", str(folder), "--prompts", str(messages), "--save-prefix", encoded]) == 2
    sampled = ["--temperature", "1", "--num-return-sequences", "3"]
    first = run("first", whole, *sampled, "--seed", "1")
    assert len(first) == 6
    assert first == run("again", whole, *sampled, "--seed", "1")
    assert first != run("other", whole, *sampled, "--seed", "2")
    assert len(run("beams", whole, "--num-beams", "2", "--num-return-sequences", "2")) == 4


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "line 1: expected one of prompt"),
        ({"prompt": "a", "prompt_ids": [1]}, "line 1: expected one of prompt"),
        ({"prompt": " "}, "line 1: field 'prompt' is blank"),
        ({"prompt_ids": []}, "line 1: field 'prompt_ids' must be a list of integer"),
        ({"prompt_ids": ["a"]}, "line 1: field 'prompt_ids' must be a list of integer"),
        ({"prompt_ids": [True]}, "line 1: field 'prompt_ids' must be a list of integer"),
        ({"messages": ["hi"]}, "line 1: field 'messages' must be a list of messages"),
    ],
)
def test_lines_that_hold_no_prompt_are_refused(tmp_path, record, words):
    with pytest.raises(InvalidDataError, match=words):
        read_prompts(write(tmp_path / "prompts.jsonl", record))


def test_messages_are_prompts(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    assert read_prompts(write(tmp_path / "prompts.jsonl", {"messages": messages})) == {1: messages}


def test_a_broken_line_is_named_with_its_column(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"prompt": "a"\n', encoding="utf-8")
    with pytest.raises(InvalidDataError, match=r"prompts.jsonl, line 2: not valid JSON .*column 15"):
        read_prompts(path)
    for content, words in (("\n", "is empty"), ("[1]\n", "line 1: expected a JSON object")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InvalidDataError, match=words):
            read_prompts(path)


def test_failures_are_one_message(folder, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt_ids": [999]})
    assert main(["generate", str(folder), "--prompts", str(prompts)]) == 1
    assert "prompts.jsonl, line 1: has token id 999, outside the vocabulary of 258" in capsys.readouterr().err
    messages = write(tmp_path / "messages.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    (tmp_path / "prefix.txt").write_text("a", encoding="utf-8")
    assert main(["generate", str(folder), "--prompts", str(messages), "--prefix", str(tmp_path / "prefix.txt")]) == 1
    assert "--prefix is a text" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompts", str(messages)]) == 1
    assert "prompt 0 is chat messages, and the tokenizer has no chat template" in capsys.readouterr().err
    # transformers makes up an empty tokenizer for this type
    tiny_model("qwen2", vocab_size=258, seed=4).save_pretrained(tmp_path / "bare")
    for records, status in (({"prompt": "a"}, 1), ({"prompt_ids": [5]}, 0)):
        some = write(tmp_path / "some.jsonl", records)
        assert main(["generate", str(tmp_path / "bare"), "--prompts", str(some), "--max-new-tokens", "1"]) == status
        assert ("has no tokenizer that can be loaded" in capsys.readouterr().err) == bool(status)
    assert main(["generate", str(folder / "config.json"), "--prompts", str(prompts)]) == 1
    message = capsys.readouterr().err
    assert "give the folder of a saved model" in message
    assert "--random-init" not in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_message(folder, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt_ids": [5, 6]})
    command = [sys.executable, "-m", "stemma.cli.main", "generate", str(folder), "--prompts", str(prompts)]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--max-new-tokens=2"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "stemma: cannot write: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def with_special_tokens(folder, single):
    """The folder of the model with a tokenizer that writes special tokens around a text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tiny_model(seed=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("special", "front"), [("<eos> $A", [256]), ("$A <eos>", [])])
def test_no_special_token_stands_between_a_prefix_and_a_prompt(tmp_path, capsys, special, front):
    model = with_special_tokens(tmp_path / "model", special)
    (tmp_path / "prefix.txt").write_text("document. ", encoding="utf-8")
    common = ["generate", str(model), "--max-new-tokens", "5", "--json"]
    given = write(tmp_path / "rest.jsonl", {"prompt": "A"}, {"prompt": "B"})
    assert main([*common, "--prompts", str(given), "--prefix", str(tmp_path / "prefix.txt")]) == 0
    result = json.loads(capsys.readouterr().out)
    whole = [{"prompt_ids": [*front, *f"document. {name}".encode()]} for name in "AB"]
    assert main([*common, "--prompts", str(write(tmp_path / "whole.jsonl", *whole))]) == 0
    assert json.loads(capsys.readouterr().out)["generations"] == result["generations"]


def test_the_report_counts_the_prefix(folder, tmp_path, capsys):
    (tmp_path / "prefix.txt").write_text("x" * 40, encoding="utf-8")
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "one"}, {"prompt": "two"}, {"prompt": "sixteen"})
    encoded = str(tmp_path / "encoded")
    common = ["generate", str(folder), "--prompts", str(prompts), "--max-new-tokens", "3", "--report", "--json"]
    for batching in ([], ["--batch-size=2"]):
        flags = ["--prefix", str(tmp_path / "prefix.txt"), *([] if batching else ["--save-prefix", encoded])]
        assert main([*common, *flags, *batching]) == 0
        captured = capsys.readouterr()
        assert "130 prompt tokens of which 10 were encoded; 120 are the prefix of 40" in captured.err
        assert "prefix: 40 tokens, encoded once, 80 fewer encoded" in captured.err
        result = json.loads(captured.out)
        assert result["prefix"] == {"tokens": 40, "encoded": True, "saved_tokens": 80}
        assert (result["report"]["rows"], result["report"]["prefix_tokens"]) == (3, 40)
    assert main([*common, "--prefix", encoded]) == 0
    assert f"prefix: 40 tokens, read from {encoded}, 120 fewer encoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"num_beams": 2, "temperature": 1.0}, "choose one"),
        ({"num_return_sequences": 2}, "the same sequence again"),
        ({"top_p": 0.9}, "--top-p applies to sampling only"),
        ({"top_k": 5}, "--top-k applies to sampling only"),
        ({"batch_size": 0}, "--batch-size"),
        ({"resume": True}, "--resume continues an --output"),
    ],
)
def test_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Config(model="m", prompts=Path("p"), **options)


def test_standard_output_that_takes_no_character_or_is_closed_is_no_fault_of_the_work(
    folder, tmp_path, capsys, monkeypatch
):
    """An ASCII terminal gets JSON in escapes; without standard output there must be a file, which is then written."""
    prompts, output = write(tmp_path / "prompts.jsonl", {"prompt": "é"}), tmp_path / "out.jsonl"
    command = ["generate", str(folder), "--prompts", str(prompts), "--max-new-tokens", "8"]
    with monkeypatch.context() as patch:
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr("sys.stdout", narrow)
        assert main(command) == 0
        printed = narrow.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        patch.setattr("sys.stdout", None)
        assert main(command) == 1
        assert main([*command, "--json"]) == 1
        assert main([*command, "--output", str(output)]) == 0
    assert json.loads(printed) == json.loads(output.read_text(encoding="utf-8"))
    assert "standard output is closed; give an --output" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_prefix(folder, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "b"})
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "prefix.txt").write_bytes(mark + b"a prefix")
        output = tmp_path / f"{len(mark)}.jsonl"
        options = ["--prefix", tmp_path / "prefix.txt", "--output", output, "--max-new-tokens", "4"]
        assert main([*map(str, ["generate", folder, "--prompts", prompts, *options])]) == 0
        found.append(output.read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("flag", ["--temperature", "--top-p"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_options_that_are_no_numbers_are_refused(folder, tmp_path, capsys, flag, value):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "b"})
    assert main(["generate", str(folder), "--prompts", str(prompts), "--temperature=1", f"{flag}={value}"]) == 2
    assert flag[2:].replace("-", "_") in capsys.readouterr().err.replace("-", "_")
