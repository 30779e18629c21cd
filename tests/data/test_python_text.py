"""Text of the Python installation: the same every time, in splits that share nothing, refused where it is missing."""

import sys
from pathlib import Path

import pytest

from stemma.data.python_text import reference_texts, source_texts
from stemma.errors import InvalidDataError


@pytest.mark.parametrize("texts", [source_texts, reference_texts])
def test_splits_cover_everything_once(texts):
    splits = {split: texts(split) for split in ("train", "validation", "test")}
    names = [name for found in splits.values() for name in found]
    assert len(names) == len(set(names))
    sizes = {split: sum(map(len, found.values())) for split, found in splits.items()}
    assert sizes["train"] > 5 * sizes["test"] > 0 < sizes["validation"]
    assert all(list(found) == sorted(found) for found in splits.values())
    assert texts("test") == splits["test"]


def test_sources_are_those_of_the_library_without_tests():
    found = {name: text for split in ("train", "validation", "test") for name, text in source_texts(split).items()}
    assert {"ast.py", "json/decoder.py", "textwrap.py"} <= set(found)
    assert found["textwrap.py"] == Path(sys.modules["textwrap"].__file__ or "").read_text(encoding="utf-8")
    assert not [name for name in found if name.startswith(("site-packages", "test/", "encodings", "_sysconfigdata"))]


def library(folder, sizes):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("#" * size)
    return folder


def test_a_file_keeps_its_split_when_others_come_and_go(tmp_path):
    sizes = {f"m{i}.py": 20_000 for i in range(120)}
    few = library(tmp_path / "few", dict(list(sizes.items())[:60]))
    many = library(tmp_path / "many", {**sizes, "site-packages/other.py": 9, "test/m.py": 9})
    for split in ("train", "validation", "test"):
        assert set(source_texts(split, library=few)) == set(source_texts(split, library=many)) & set(sizes) & {
            f"m{i}.py" for i in range(60)
        }
    assert "site-packages/other.py" not in source_texts("train", library=many)


@pytest.mark.parametrize("sizes", [{}, {"a.py": 999_999}, {"a.py": 10, "site-packages/b.py": 2_000_000}])
def test_a_python_without_sources_is_refused(sizes, tmp_path):
    with pytest.raises(InvalidDataError, match="comes with its sources"):
        source_texts("train", library=library(tmp_path, sizes))


def test_a_python_without_topics_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InvalidDataError, match="topics"):
        reference_texts("train")


@pytest.mark.parametrize("texts", [source_texts, reference_texts])
def test_an_unknown_split_is_refused(texts):
    with pytest.raises(ValueError, match="train, validation, test"):
        texts("dev")


def test_unseen_prose_is_not_in_the_prose_to_train_on():
    """help() prints some paragraphs under several topics."""
    train = "\n".join(reference_texts("train").values())
    for split in ("validation", "test"):
        for text in reference_texts(split).values():
            rows = [text[begin : begin + 128] for begin in range(0, len(text) - 128, 64)]
            assert sum(row in train for row in rows) <= 0.02 * len(rows)
    for text in reference_texts("test").values():
        assert not [p for p in text.split("\n\n") if len(" ".join(p.split())) >= 80 and p in train]
