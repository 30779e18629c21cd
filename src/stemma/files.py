"""Outputs that appear whole or not at all, and the lock that keeps two processes from writing the same one."""

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stemma.errors import OutputError

if sys.platform != "win32":
    import fcntl

__all__ = ["digest", "locked", "remove", "replacing", "write_json", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """A path beside `path` for the block to write a file or a folder to, which then takes the place of `path`.

    When the block fails, what it wrote is removed and `path` stays as it was. What a killed process of this machine has
    left behind is removed by the next one that writes the same path (not on Windows).

    Args:
        overwrite: False keeps what another process has put there in the meantime, and drops what the block wrote.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    for leftover in _leftovers(path):
        _delete(leftover)
    try:
        yield temporary
        if overwrite or not path.exists():
            if path.is_dir() and not path.is_symlink():  # a folder cannot be renamed over another
                os.replace(path, _away(path))
            os.replace(temporary, path)
    finally:
        _delete(temporary)
        _delete(_away(path))


def digest(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of the names and contents of files, as 32 hexadecimal digits; reads about 1 GB a second."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{Path(path).name} {content}\n".encode())
    return whole.hexdigest()[:32]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text; the file is whole or as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON; the file is whole or as it was."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove a folder: under another name first, so that it is never there in part."""
    away = _away(Path(folder))
    os.replace(folder, away)
    _delete(away)


@contextmanager
def locked(output: str | os.PathLike[str]) -> Iterator[None]:
    """Own `output` for the block, by a file `.lock` in a folder, or `.NAME.lock` beside what is no folder.

    The lock holds the host and process id of its owner. The system frees the lock when its owner dies, however it dies;
    the file that is then left is taken over with a note on standard error. One that was left on another machine is
    refused, because not every network file system passes locks on. Windows has no such locks: nothing is kept from
    writing there.

    Raises:
        OutputError: another process holds it, or it cannot be written; says who, and what to do.
    """
    if sys.platform == "win32":
        yield
        return
    output = Path(output)
    path = output / ".lock" if output.is_dir() else output.parent / f".{output.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}; choose another output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):  # held, or just given up and removed
            taken = False
        except OSError as error:
            raise OutputError(f"cannot lock {output}: {error.strerror}; choose an output on another disk") from error
        file.seek(0)
        owner = file.read().strip()
        if not taken:
            raise OutputError(
                f"{owner or 'another process'} is writing {output} (says {path}); wait for it, or choose another output"
            )
        if owner and not owner.endswith(f" on {socket.gethostname()}"):
            raise OutputError(
                f"{owner} was writing {output} and has not finished; if that process no longer runs, remove {path}"
            )
        if owner:
            print(f"took over {path} of {owner}, which is gone", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _away(path: Path) -> Path:
    return path.with_name(f"{_temporary(path).name}.old.tmp")


def _leftovers(path: Path) -> Iterator[Path]:
    """Temporary files of `path` whose process of this machine is gone."""
    before = f".{path.name}.{socket.gethostname()}."
    for each in path.parent.iterdir():
        number = each.name.removeprefix(before).partition(".")[0]
        if each.name.startswith(before) and each.name.endswith(".tmp") and number.isdigit() and not _runs(int(number)):
            yield each


def _runs(process: int) -> bool:
    if sys.platform == "win32":  # where a signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no process id
        pass
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
