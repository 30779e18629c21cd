"""The corpus: imports that refuse by line, resume and change nothing twice; versions; threads."""

import json
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from search.letters import made_up
from stemma.errors import InvalidDataError
from stemma.search.corpus import Added, Corpus, Document, migrate


@pytest.fixture
def corpus(tmp_path):
    return Corpus.open(tmp_path / "texts.sqlite")


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def test_what_is_added_is_there_once(corpus, tmp_path):
    records = made_up(2500)
    assert corpus.add(records) == Added(new=2500)
    revision = corpus.revision
    assert corpus.add(reversed(records)) == Added(unchanged=2500)
    assert corpus.revision == revision
    assert [document.id for document in Corpus.open(corpus.path)] == [record["id"] for record in records]
    text, year = records[7]["text"], records[7]["year"]
    assert corpus.documents(["d0007", "nobody", "d0001"])["d0007"] == Document("d0007", text, {"year": year})
    assert list(corpus.documents(["d0007", "nobody", "d0001"])) == ["d0007", "d0001"]


def test_a_changed_text_gets_a_new_number_and_changed_metadata_do_not(corpus):
    corpus.add([{"id": "a", "text": "one"}, {"id": "b", "text": "two", "votes": 1}])
    with pytest.raises(InvalidDataError, match=r"record 1: another document of .* has the id 'b'"):
        corpus.add([{"id": "b", "text": "two", "votes": 2}])
    assert corpus.add([{"id": "b", "text": "two", "votes": 2}], update=True) == Added(updated=1)
    assert corpus.numbers() == {1: "a", 2: "b"}
    assert corpus.documents(["b"])["b"].metadata == {"votes": 2}
    assert corpus.add([{"id": "a", "text": "three"}], update=True) == Added(updated=1)
    assert corpus.numbers() == {2: "b", 3: "a"}
    assert corpus.remove(["a", "nobody"]) == 1
    corpus.add([{"id": "c", "text": "four"}])
    assert corpus.numbers() == {2: "b", 4: "c"}  # 3 is never given again
    with pytest.raises(sqlite3.IntegrityError, match="replaced by removing"):
        corpus.connection.execute("UPDATE documents SET text = 'x' WHERE id = 'b'")


def test_several_fields_make_a_text_and_the_title_stays(corpus, tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"key": 7, "title": "T", "abstract": "A", "n": 1},
        {"key": 8, "title": "U", "abstract": None},
    )
    corpus.import_jsonl(path, id="key", text=("title", "abstract"))
    assert list(corpus) == [Document("7", "T\nA", {"title": "T", "n": 1}), Document("8", "U", {"title": "U"})]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ({"text": "x"}, "line 2: field 'id' must hold an id"),
        ({"id": " ", "text": "x"}, "line 2: field 'id' must hold an id"),
        ({"id": True, "text": "x"}, "line 2: field 'id' must hold an id"),
        ({"id": "b"}, "line 2: no text in 'text'; found .*'id'"),
        ({"id": "b", "text": "\n "}, "line 2: no text"),
        ({"id": "b", "text": ["x"]}, "line 2: no text"),
        ('{"id": "b", "text": "\\ud800"}', "line 2: holds half of a surrogate pair"),
        ({"id": "a", "text": "other"}, "line 2: another document has the id 'a': .*line 1"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(corpus, tmp_path, line, complaint):
    path = write(tmp_path / "bad.jsonl", {"id": "a", "text": "x"}, line, {"id": "c", "text": "x"})
    with pytest.raises(InvalidDataError, match=complaint):
        corpus.import_jsonl(path)
    assert len(corpus) == 0


@pytest.mark.parametrize("record", [{"text": "\ud800"}, {"text": "x", "n": float("nan")}, {"text": "x", "n": object()}])
def test_a_record_that_cannot_be_stored_is_named(corpus, record):
    with pytest.raises(InvalidDataError, match="record 2: cannot be stored"):
        corpus.add([{"id": "a", "text": "x"}, {"id": "b", **record}])
    assert len(corpus) == 0


def test_a_line_that_differs_from_the_corpus_is_named_before_anything_is_written(corpus, tmp_path):
    corpus.add([{"id": "z", "text": "old"}])
    path = write(tmp_path / "more.jsonl", {"id": "a", "text": "x"}, {"id": "z", "text": "new"})
    with pytest.raises(InvalidDataError, match=r"line 2: another document of .* has the id 'z'"):
        corpus.import_jsonl(path)
    assert len(corpus) == 1
    assert corpus.import_jsonl(path, update=True) == Added(new=1, updated=1)
    assert corpus.import_jsonl(path) == Added(unchanged=2)


IMPORT = """
import sys
from stemma.search.corpus import Corpus
Corpus.open(sys.argv[1]).import_jsonl(sys.argv[2])
"""


def test_a_killed_import_goes_on(tmp_path):
    records = made_up(20_000)
    path = write(tmp_path / "many.jsonl", *records)
    corpus = Corpus.open(tmp_path / "texts.sqlite")
    process = subprocess.Popen([sys.executable, "-c", IMPORT, corpus.path, path])
    while len(corpus) == 0:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = len(corpus)
    assert 0 < there < 20_000
    assert there % 1000 == 0
    assert corpus.import_jsonl(path) == Added(new=20_000 - there, unchanged=there)
    assert list(corpus) == [Document(each["id"], each["text"], {"year": each["year"]}) for each in records]


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(InvalidDataError, match=r"there is no corpus .*stemma index"):
        Corpus.open(tmp_path / "none.sqlite", create=False)
    (tmp_path / "text").write_text("This is no database, only a long enough text." * 20)
    with pytest.raises(InvalidDataError, match="file is not a database"):
        Corpus.open(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE mine (x)")
    with pytest.raises(InvalidDataError, match="SQLite file of another program"):
        Corpus.open(tmp_path / "other.sqlite")
    with pytest.raises(InvalidDataError, match="unable to open"):
        Corpus.open(tmp_path / "no folder" / "texts.sqlite")


def test_versions_are_kept_apart_and_a_newer_one_is_refused(corpus):
    first = (("CREATE TABLE votes (id TEXT)", "INSERT INTO votes VALUES ('a')"),)
    second = (*first, ("ALTER TABLE votes ADD COLUMN count INTEGER DEFAULT 3",))
    migrate(corpus.connection, "room", first)
    with pytest.raises(sqlite3.OperationalError, match="syntax"):
        migrate(
            corpus.connection, "room", (*first, ("ALTER TABLE votes ADD COLUMN count INTEGER DEFAULT 2", "NONSENSE"))
        )
    for _ in range(2):
        migrate(corpus.connection, "room", second)
        assert corpus.connection.execute("SELECT * FROM votes").fetchall() == [("a", 3)]
    with pytest.raises(InvalidDataError, match="'room' tables are of version 2, this program knows 1"):
        migrate(corpus.connection, "room", first)
    corpus.connection.execute("UPDATE schema_versions SET version = 9 WHERE part = 'corpus'")
    with pytest.raises(InvalidDataError, match="version 9"):
        Corpus.open(corpus.path)


def test_threads_read_while_one_writes(corpus):
    corpus.add(made_up(50))
    seen = []

    def read():
        seen.append(len(corpus))
        corpus.close()

    with corpus.writing() as connection:
        connection.execute("DELETE FROM documents")
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert seen == [50]
    assert len(corpus) == 0
    with pytest.raises(InvalidDataError, match="UNIQUE"), corpus.writing() as connection:
        connection.executemany("INSERT INTO documents (id, text, metadata) VALUES ('a', ?, '{}')", [("b",), ("c",)])
    assert len(corpus) == 0
