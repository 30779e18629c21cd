"""A collection of texts in one SQLite file: ids, texts, metadata and a full-text index; the standard library is enough.

Every text has a number that is given once and never again. A document whose text changes gets a new number, so that an
index which keeps numbers knows by them alone what it lacks and what is gone. The file is in write-ahead mode: one
process writes while others read.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from stemma.data.records import read_jsonl
from stemma.errors import InvalidDataError

__all__ = ["Added", "Corpus", "Document", "migrate"]

_SCHEMA = (
    (
        "CREATE TABLE corpus (id TEXT NOT NULL, revision INTEGER NOT NULL)",
        "INSERT INTO corpus VALUES (lower(hex(randomblob(16))), 0)",
        """CREATE TABLE documents (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, metadata TEXT NOT NULL
        )""",
        """CREATE VIRTUAL TABLE words USING fts5(
            text, content='documents', content_rowid='number', tokenize='porter unicode61 remove_diacritics 2'
        )""",
        """CREATE TRIGGER document_added AFTER INSERT ON documents BEGIN
            INSERT INTO words (rowid, text) VALUES (new.number, new.text);
            UPDATE corpus SET revision = revision + 1;
        END""",
        """CREATE TRIGGER document_removed AFTER DELETE ON documents BEGIN
            INSERT INTO words (words, rowid, text) VALUES ('delete', old.number, old.text);
            UPDATE corpus SET revision = revision + 1;
        END""",
        """CREATE TRIGGER text_stays BEFORE UPDATE OF number, id, text ON documents BEGIN
            SELECT RAISE(ABORT, 'a text is replaced by removing its document and adding it again');
        END""",
    ),
)
"""Statements that lead from each version of the schema to the next."""
_BATCH = 1000
"""Documents of one transaction: what an interrupted import loses at most."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what is known of it."""

    id: str
    text: str
    metadata: Mapping[str, Any]
    """JSON data."""


@dataclass(frozen=True, slots=True)
class Added:
    """Documents that an import found new, replaced, and left as they were."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0


class Corpus:
    """Documents in the SQLite file `path`; see `open`.

    Threads may share a corpus: each gets its own connection. Programs may keep tables of their own in the file, see
    `migrate`.
    """

    def __init__(self, path: str | PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self._threads = threading.local()
        if not create and not self.path.exists():
            raise InvalidDataError(
                f"there is no corpus {self.path}; make it with `stemma index {self.path} --input FILE`"
            )
        with self._named_errors():
            tables = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
            if tables and "schema_versions" not in tables:
                raise InvalidDataError(f"{self.path} is a SQLite file of another program; choose another path")
            self.connection.execute("PRAGMA journal_mode = WAL")
            migrate(self.connection, "corpus", _SCHEMA)
            (self.id,) = self.connection.execute("SELECT id FROM corpus").fetchone()

    @classmethod
    def open(cls, path: str | PathLike[str], *, create: bool = True) -> "Corpus":
        """Open the corpus in a SQLite file.

        Args:
            path: the file.
            create: make an empty corpus where there is no file; otherwise that is refused.

        Raises:
            InvalidDataError: the file cannot be opened, is not a corpus, or was made by a newer version.
        """
        return cls(path, create=create)

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this thread, in autocommit mode."""
        if not hasattr(self._threads, "connection"):
            with self._named_errors():
                self._threads.connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._threads.connection.execute("PRAGMA synchronous = NORMAL")
        return self._threads.connection

    def close(self) -> None:
        """Close this thread's connection; the next use opens another."""
        if hasattr(self._threads, "connection"):
            self._threads.connection.close()
            del self._threads.connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: the file gets all of it, or nothing when the block fails."""
        with self._named_errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    def rows(self, sql: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query."""
        with self._named_errors():
            yield from self.connection.execute(sql, parameters)

    # ------------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return next(self.rows("SELECT count(*) FROM documents"))[0]

    def __iter__(self) -> Iterator[Document]:
        """All documents, in the order of their numbers."""
        for name, text, metadata in self.rows("SELECT id, text, metadata FROM documents ORDER BY number"):
            yield Document(name, text, json.loads(metadata))

    def documents(self, ids: Iterable[str]) -> dict[str, Document]:
        """The documents with these ids, in that order; ids that are not there are left out."""
        ids = list(ids)
        query = "SELECT id, text, metadata FROM documents WHERE id IN (SELECT value FROM json_each(?))"
        found = {row[0]: Document(row[0], row[1], json.loads(row[2])) for row in self.rows(query, json.dumps(ids))}
        return {name: found[name] for name in ids if name in found}

    def names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Number -> id, for some numbers."""
        query = "SELECT number, id FROM documents WHERE number IN (SELECT value FROM json_each(?))"
        return dict(self.rows(query, json.dumps(list(numbers))))

    @property
    def revision(self) -> int:
        """Grows with every text that is added or removed."""
        return next(self.rows("SELECT revision FROM corpus"))[0]

    def numbers(self) -> dict[int, str]:
        """Number -> id of every document, in the order of numbers."""
        return dict(self.rows("SELECT number, id FROM documents ORDER BY number"))

    @property
    def last_number(self) -> int:
        """The largest number that was ever given, 0 before the first."""
        return next(self.rows("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'documents'"))[0]

    def texts(self, after: int, limit: int) -> list[tuple[int, str]]:
        """Numbers and texts of the first `limit` documents (-1: all) with a number above `after`."""
        return list(
            self.rows("SELECT number, text FROM documents WHERE number > ? ORDER BY number LIMIT ?", after, limit)
        )

    # ------------------------------------------------------------------------------------------ writing

    def add(
        self,
        records: Iterable[Mapping[str, Any]],
        *,
        id: str = "id",
        text: str | Sequence[str] = "text",
        update: bool = False,
    ) -> Added:
        """Add documents, a thousand to a transaction; those that are there already are left as they are.

        Args:
            records: JSON objects.
            id: the field with the id, text or a whole number.
            text: the field with the text, or several fields, whose texts are joined by line breaks; all but one of
                several may be missing. The other fields become metadata, and of several also the first (a title).
            update: replace a document whose text or metadata differ, instead of refusing the record.

        Raises:
            InvalidDataError: a record that cannot be used, or another document has its id; says which record. The
                thousands before it have been added.
        """
        made = ((f"record {number}", record) for number, record in enumerate(records, start=1))
        return self._add(((where, _document(where, record, id, text)) for where, record in made), update)

    def import_jsonl(
        self, path: str | PathLike[str], *, id: str = "id", text: str | Sequence[str] = "text", update: bool = False
    ) -> Added:
        """Add the documents of a JSON Lines file; for the arguments see `add`.

        The whole file is checked before anything is written. An import that was interrupted goes on when it is called
        again: what is there is found unchanged.

        Raises:
            InvalidDataError: a line that cannot be used, two lines, or a line and a document of the corpus, that differ
                under one id; says which line. Nothing has been added.
        """

        def lines() -> Iterator[tuple[str, Document]]:
            for number, record in read_jsonl(path):
                yield f"{path}, line {number}", _document(f"{path}, line {number}", record, id, text)

        seen: dict[str, tuple[int, str]] = {}
        for where, document in lines():
            if not update:
                content = hash((document.text, _json(document)))
                before, at = seen.setdefault(document.id, (content, where))
                if before != content:
                    raise InvalidDataError(f"{where}: another document has the id '{document.id}': {at}; {_TWICE}")
                self._is_there(document, where, update)
        return self._add(lines(), update)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents; ids that are not there are passed over. Returns how many there were."""
        with self.writing() as connection:
            query = "DELETE FROM documents WHERE id IN (SELECT value FROM json_each(?))"
            return connection.execute(query, (json.dumps(list(ids)),)).rowcount

    def _add(self, documents: Iterator[tuple[str, Document]], update: bool) -> Added:
        new = updated = unchanged = 0
        while batch := list(islice(documents, _BATCH)):
            with self.writing() as connection:
                for where, document in batch:
                    there = self._is_there(document, where, update)
                    if there is None or there.text != document.text:
                        connection.execute("DELETE FROM documents WHERE id = ?", (document.id,))
                        row = (document.id, document.text, _json(document))
                        connection.execute("INSERT INTO documents (id, text, metadata) VALUES (?, ?, ?)", row)
                    elif there != document:
                        sql = "UPDATE documents SET metadata = ? WHERE id = ?"
                        connection.execute(sql, (_json(document), document.id))
                    new += there is None
                    unchanged += there == document
                    updated += there is not None and there != document
        return Added(new, updated, unchanged)

    def _is_there(self, document: Document, where: str, update: bool) -> Document | None:
        """The document with the same id; one that differs is refused without `update`."""
        there = self.documents([document.id]).get(document.id)
        if there is not None and there != document and not update:
            raise InvalidDataError(f"{where}: another document of {self.path} has the id '{document.id}'; {_TWICE}")
        return there

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InvalidDataError(f"{self.path}: SQLite says: {error}") from error


_TWICE = "remove one of them, or ask for an update to replace the first"


def migrate(connection: sqlite3.Connection, part: str, schema: Sequence[Sequence[str]]) -> None:
    """Bring the tables of one part of a program to their newest version, all of it or nothing.

    Args:
        connection: in autocommit mode.
        part: its name; each part of a file has its own version.
        schema: the statements that lead from each version to the next, from an empty file on.

    Raises:
        InvalidDataError: the file has a newer version than `schema`.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_versions (part TEXT PRIMARY KEY, version INTEGER NOT NULL)"
        )
        row = connection.execute("SELECT version FROM schema_versions WHERE part = ?", (part,)).fetchone()
        version = row[0] if row else 0
        if version > len(schema):
            raise InvalidDataError(
                f"the file's '{part}' tables are of version {version}, this program knows {len(schema)}; upgrade it"
            )
        for statements in schema[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (part, len(schema)))
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _document(where: str, record: Mapping[str, Any], id: str, text: str | Sequence[str]) -> Document:
    """The document of a record.

    Raises:
        InvalidDataError: it has no id or no text, or holds what cannot be stored.
    """
    fields = (text,) if isinstance(text, str) else tuple(text)
    name = record.get(id)
    if not isinstance(name, int | str) or isinstance(name, bool) or not str(name).strip():
        raise InvalidDataError(f"{where}: field '{id}' must hold an id, text or a whole number; got {name!r:.60}")
    texts = [record[field] for field in fields if record.get(field) is not None]
    if not texts or not all(isinstance(each, str) for each in texts) or not "".join(texts).strip():
        raise InvalidDataError(f"{where}: no text in {' or '.join(map(repr, fields))}; found {sorted(record)}")
    kept = set(record) - {id, *fields} | (set(fields[:1]) if len(fields) > 1 else set())
    document = Document(str(name), "\n".join(texts), {field: record[field] for field in record if field in kept})
    try:
        (document.id + document.text + _json(document)).encode()
    except (TypeError, ValueError) as error:  # among them UnicodeEncodeError: half of a surrogate pair
        raise InvalidDataError(f"{where}: cannot be stored as UTF-8 and JSON: {error}") from None
    return document


def _json(document: Document) -> str:
    return json.dumps(document.metadata, ensure_ascii=False, allow_nan=False)
