import pytest

from stemma.data.records import PromptRecord, read_jsonl, read_prompts
from stemma.errors import InvalidDataError


def write(path, content: bytes):
    file = path / "prompts.jsonl"
    file.write_bytes(content)
    return file


def test_prompts_with_and_without_answers(tmp_path):
    lines = '{"prompt": "één?", "answer": "1", "other": [2]}\n\n{"prompt": "two"}\r\n{"prompt": " 3", "answer": null}'
    file = write(tmp_path, lines.encode())
    assert read_prompts(file) == [PromptRecord("één?", "1"), PromptRecord("two"), PromptRecord(" 3")]
    assert [number for number, _ in read_jsonl(file)] == [1, 3, 4]
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbf" + lines.encode())) == read_prompts(file)  # a byte order mark
    assert read_prompts(write(tmp_path, b'{"prompt": "\\ud83d\\ude00"}')) == [PromptRecord("\U0001f600")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b'{"prompt": "a"}\n{"prompt": "b"', r"line 2: not valid JSON \(.*column 15"),
        (b'{"prompt": "a"}\n{"prompt": "b"\r\n{}\n', r"line 2: not valid JSON \(.*column 15"),
        (b'{"prompt": "a"}\n\xff\xfe', r"line 2: not UTF-8 \(byte 0\)"),
        (b'{"prompt": "\\ud83d"}', "line 1: holds half of a surrogate pair"),
        (b'{"prompt": 1e5, "answer": NaN}', "line 1: NaN is not JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: a number has too many digits"),
        (b'{"prompt": ' + b"[" * 99999, "line 1: the JSON is nested too deep"),
        ("\ufeff".encode("utf-16"), "line 1: not UTF-8"),
        (b'["prompt"]', "line 1: expected a JSON object, got list"),
        (b'{"question": "a"}', r"line 1: field 'prompt' is missing; found \['question'\]"),
        (b'{"prompt": 3}', "line 1: field 'prompt' must be text, got int"),
        (b'{"prompt": " "}', "line 1: field 'prompt' is blank"),
        (b'{"prompt": "a", "answer": 3}', "line 1: field 'answer' must be text, got int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    with pytest.raises(InvalidDataError, match=rf"prompts\.jsonl.*{message}"):
        read_prompts(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidDataError, match=r"absent\.jsonl: No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidDataError, match="cannot read"):
        read_prompts(tmp_path)
