"""The output of `stemma generate` while it grows: finished batches in a hidden file beside it, renamed at the end."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stemma.errors import InvalidDataError
from stemma.files import replacing

__all__ = ["Output"]


class Output:
    """A file of lines that appears when it is complete.

    Until then its lines are in `.NAME.partial` beside it, below a first line with the settings that decide them; those
    of a batch that a kill cut off are dropped on opening. The partial file is removed on leaving when it has no batch.

    Args:
        path: the file to write.
        settings: JSON data.
        batches: lines of each batch, in order.
        resume: go on with what there is.

    Raises:
        InvalidDataError: the file exists or was begun without `resume`, or there is nothing to go on with; the settings
            differ, or it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batches: Sequence[int], resume: bool) -> None:
        self.path, self.partial = path, path.parent / f".{path.name}.partial"
        self.lines: list[dict[str, Any]] = []
        """Those that are written."""
        self.done = 0
        """Batches that are written."""
        head, lines = self._read(resume)
        if resume:
            self._check(head, settings)
        kept = 0
        while self.done < len(batches) and kept + batches[self.done] <= len(lines):
            kept, self.done = kept + batches[self.done], self.done + 1
        try:
            self.lines = [json.loads(line) for line in lines[:kept]]
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("r+b" if resume else "wb", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        if resume:
            self._file.truncate(sum(len(line) + 1 for line in (head, *lines[:kept])))
            self._file.seek(0, os.SEEK_END)
            return
        try:
            self._write(json.dumps(settings).encode("utf-8") + b"\n")
        except InvalidDataError:
            self.__exit__(None, None, None)
            raise

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of one batch and hand them to the operating system."""
        self._write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8"))
        self.lines += map(dict, lines)
        self.done += 1

    def finish(self) -> None:
        """Let the file appear."""
        try:
            with replacing(self.path) as temporary, self.partial.open("rb") as source, temporary.open("wb") as target:
                source.readline()
                target.writelines(source)
        except OSError as error:
            raise self._unwritable(error) from error
        self.partial.unlink()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if not self.done:
            self.partial.unlink(missing_ok=True)
        elif kind is not None:
            print(f"{self.done} finished batches are in '{self.partial}'; continue with --resume", file=sys.stderr)

    def _read(self, resume: bool) -> tuple[bytes, list[bytes]]:
        """The first line of the partial file and the others; nothing where it has none."""
        path = self.path
        if path.is_dir():
            raise InvalidDataError(f"'{path}' is a folder; give the path of a file to --output")
        if path.exists() and not resume:
            raise InvalidDataError(f"'{path}' exists; choose another --output")
        try:
            head, *lines = self.partial.read_bytes().split(b"\n")[:-1] or [b""]
        except FileNotFoundError:
            if resume and path.exists():
                raise InvalidDataError(f"'{path}' is finished; there is nothing to resume") from None
            if resume:
                raise InvalidDataError(f"there is no generation to resume in '{path}'; leave out --resume") from None
            return b"", []
        except OSError as error:
            raise self._unwritable(error) from error
        if lines and not resume:
            raise InvalidDataError(
                f"'{path}' was begun and is not finished; continue it with --resume, or remove '{self.partial}'"
            )
        return head, lines

    def _check(self, head: bytes, settings: Mapping[str, Any]) -> None:
        try:
            kept = dict(json.loads(head))
        except (ValueError, RecursionError, TypeError) as error:
            raise self._damaged(error) from error
        for name, value in settings.items():
            if kept.get(name) != value:
                raise InvalidDataError(
                    f"{name} is {kept.get(name)!r} in the unfinished '{self.path}', not {value!r}; a resumed "
                    "generation keeps its settings"
                )

    def _write(self, content: bytes) -> None:
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def _damaged(self, error: Exception) -> InvalidDataError:
        return InvalidDataError(f"'{self.partial}' is damaged ({error}); remove it and leave out --resume")

    def _unwritable(self, error: OSError) -> InvalidDataError:
        return InvalidDataError(f"cannot write {self.path}: {error.strerror}; choose another path, or make room")
