"""`stemma index`, `search` and `evaluate-run`: from texts to a table of measures; what is wrong is one sentence."""

import json

import numpy as np
import pytest

from stemma.cli.main import main
from stemma.search import encoded, read_run

TEXTS = [
    {"id": "p1", "title": "Pruning", "abstract": "Small models that keep their quality.", "votes": 3},
    {"id": "p2", "title": "Cooking", "abstract": "Beans, slowly."},
    {"id": "p3", "title": "Pruning trees", "abstract": "In the garden."},
]


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def call(capsys, *arguments):
    """The result of a command."""
    status = main([*arguments, "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out) | {"exit_status": status}


@pytest.fixture
def corpus(tmp_path, capsys):
    path = str(tmp_path / "papers.sqlite")
    found = call(
        capsys, "index", path, "--input", lines(tmp_path / "p.jsonl", *TEXTS), "--text-fields", "title", "abstract"
    )
    assert found == {"corpus": path, "texts": 3, "new": 3, "updated": 0, "unchanged": 0, "exit_status": 0}
    return path


@pytest.fixture
def encoder(monkeypatch):
    """What stands in for a model of sentence-transformers: a vector that only knows gardens from kitchens."""

    def vectors(texts):
        return np.array([[1.0, "ook" in text or "eans" in text, "arden" in text] for text in texts])

    monkeypatch.setattr(encoded, "load_encoder", lambda encoder, kind: vectors)
    monkeypatch.setattr("stemma.search.dense.load_encoder", lambda encoder, kind: vectors)
    monkeypatch.setattr("stemma.search.sparse.load_encoder", lambda encoder, kind: vectors)


def test_texts_are_found_by_words(corpus, capsys):
    (hit,) = call(capsys, "search", corpus, "quality (models*)")["hits"]
    assert (hit["id"], hit["matched"]) == ("p1", ["models", "quality"])
    assert hit["metadata"] == {"title": "Pruning", "votes": 3}
    assert main(["search", corpus, "quality"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("  1. p1")
    assert second.strip() == "Pruning Small models that keep their quality."


def test_indexes_are_made_mixed_and_noticed_when_stale(corpus, encoder, tmp_path, capsys):
    refused = call(capsys, "search", corpus, "cooks", "--encoder", "m")
    assert refused["exit_status"] == 1
    assert "lacks 3 texts" in refused["message"]
    assert "stemma index" in refused["message"]
    made = call(capsys, "index", corpus, "--encoder", "m", "--sparse-encoder", "s", "--dtype", "float16")
    assert (made["encoded"], made["sparse_encoded"]) == (3, 3)
    assert call(capsys, "index", corpus, "--encoder", "m")["encoded"] == 0
    found = call(
        capsys, "search", corpus, "a gardener", "--encoder", "m", "--sparse-encoder", "s", "--feedback", "both"
    )
    assert found["hits"][0]["id"] == "p3"
    assert found["hits"][0]["parts"].keys() == {"lexical", "dense", "sparse"}
    lines(tmp_path / "more.jsonl", {"id": "p4", "text": "More."})
    call(capsys, "index", corpus, "--input", str(tmp_path / "more.jsonl"))
    assert "lacks 1 texts" in call(capsys, "search", corpus, "x", "--encoder", "m")["message"]


def test_a_query_without_an_answer_says_so(corpus, capsys):
    assert main(["search", corpus, "zebra"]) == 0
    assert capsys.readouterr().out == "nothing found among 3 texts\n"


def test_a_run_is_written_and_measured(corpus, encoder, tmp_path, capsys):
    queries = lines(tmp_path / "q.jsonl", {"id": "1", "text": "pruning quality"}, {"id": "2", "text": "garden cook"})
    run = str(tmp_path / "words.run")
    assert call(capsys, "search", corpus, "--queries", queries, "--output", run)["queries"] == 2
    assert list(read_run(run)["1"]) == ["p1", "p3"]
    call(capsys, "index", corpus, "--encoder", "m")
    mixed = str(tmp_path / "mixed.run")
    call(
        capsys,
        "search",
        corpus,
        "--queries",
        queries,
        "--output",
        mixed,
        "--encoder",
        "m",
        "--weights",
        "rrf",
        "--k",
        "2",
    )
    assert {len(scores) for scores in read_run(mixed).values()} == {2}
    (tmp_path / "qrels").write_text("1 0 p1 1\n2 0 p2 1\n3 0 p1 1\n")
    found = call(capsys, "evaluate-run", str(tmp_path / "qrels"), run, mixed, "--measures", "RR", "P@1")
    assert [each["run"] for each in found["runs"]] == [run, mixed]
    assert found["runs"][0]["missing"] == ["3"]
    assert found["runs"][0]["per_query"]["RR"]["1"] == 1.0
    assert found["runs"][1]["p"].keys() == {"RR", "P@1"}
    assert main(["evaluate-run", str(tmp_path / "qrels"), run, mixed]) == 0
    printed = capsys.readouterr().out
    assert "p=" in printed
    assert "1 queries judged but not in the run, such as 3" in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["search", "none.sqlite", "x"], 1, "there is no corpus none.sqlite"),
        (["search", "CORPUS", " "], 1, "the query is empty"),
        (["search", "CORPUS"], 2, "give either QUERY, or --queries"),
        (["search", "CORPUS", "x", "--k", "0"], 2, "--k must be at least 1"),
        (["search", "CORPUS", "x", "--feedback", "both"], 2, "give the --encoder"),
        (["search", "CORPUS", "--queries", "twice.jsonl", "--output", "r"], 1, "line 2: field 'id' must be there"),
        (["index", "none.sqlite"], 1, "there is no corpus none.sqlite"),
        (["index", "CORPUS", "--input", "none.jsonl"], 1, "cannot read none.jsonl"),
        (["evaluate-run", "none", "none"], 1, "cannot read none"),
        (["evaluate-run", "none", "none", "--measures", "F1"], 2, "unknown measure 'F1'"),
        (["evaluate-run", "qrels", "run"], 1, "no query of the run is judged"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(corpus, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "twice.jsonl", {"id": "1", "text": "a"}, {"id": "1", "text": "b"})
    (tmp_path / "qrels").write_text("1 0 a 1\n")
    (tmp_path / "run").write_text("2 Q0 a 1 1.0 t\n")
    assert main([corpus if each == "CORPUS" else each for each in arguments]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
