"""Text that comes with every Python: the library's source code, and the prose of its language reference.

A corpus without a download. Which files belong to which split depends on a hash of their names alone, so a file that
one split gives is in no other; of 128-byte rows of unseen sources, 1 to 3 in 100 stand in a training file too, as code
repeats itself. The reference prints paragraphs under several topics: topics with one in common share a split. Tests,
tables of character sets and what differs between machines are left out.
"""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from stemma.errors import InvalidDataError

__all__ = ["Split", "reference_texts", "source_texts"]

Split = Literal["train", "validation", "test"]

_SKIPPED = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests")
)
_SHORT_PARAGRAPH = 80  # characters; shorter ones are headings and the like
_FEWEST_BYTES = 1_000_000  # embedded and stripped-down Pythons have compiled files, or none


def source_texts(split: Split, *, library: Path | None = None) -> dict[str, str]:
    """Source files of the standard library by name (a path below the library's folder), in order of their names.

    Args:
        split: "train" has about 14 of 16 files, "validation" and "test" about one each.
        library: the folder; that of this Python when None.

    Raises:
        InvalidDataError: there are less than a million bytes of sources.
    """
    _check(split)
    folder = Path(sysconfig.get_path("stdlib")) if library is None else library
    files = {path.relative_to(folder).as_posix(): path for path in _sources(folder)}
    size = sum(path.stat().st_size for path in files.values())
    if size < _FEWEST_BYTES:
        raise InvalidDataError(
            f"{folder} holds {size:,} bytes of Python sources; expected the whole standard library, more than "
            f"{_FEWEST_BYTES:,}. Use a Python that comes with its sources (not an embedded or stripped-down one)"
        )
    found = {}
    for name in sorted(files):
        if _split_of(name) == split:
            with tokenize.open(files[name]) as file:
                found[name] = file.read()
    return found


def reference_texts(split: Split) -> dict[str, str]:
    """Topics of the language reference, as `help()` shows them, by name, in order of their names.

    Args:
        split: as of `source_texts`; by topics, those with a paragraph in common together.

    Raises:
        InvalidDataError: this Python comes without them.
    """
    _check(split)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InvalidDataError(
            "this Python has no module pydoc_data.topics; use one that comes with the topics of help()"
        ) from error
    return {name: topics[name] for name, first in _kinship(topics).items() if _split_of(first) == split}


def _check(split: Split) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")


def _sources(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = set(folders) - _SKIPPED  # what is skipped is not searched either
        yield from (
            Path(root, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        )


def _kinship(topics: Mapping[str, str]) -> dict[str, str]:
    """Of each topic, in order, the first among those that it shares a paragraph with, directly or through others."""
    first = {name: name for name in sorted(topics)}
    seen: dict[str, str] = {}
    for name in first:
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) < _SHORT_PARAGRAPH:
                continue
            family = {first[name], first[seen.setdefault(text, name)]}
            first |= {other: min(family) for other, head in first.items() if head in family}
    return first


def _split_of(name: str) -> Split:
    bucket = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 16
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
