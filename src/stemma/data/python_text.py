"""Text that comes with every Python: the library's source code, and the prose of its language reference.

A corpus without a download. Which files belong to which split depends on a hash of their names alone, so a file that
one split gives is in no other. Tests, tables of character sets and what differs between machines are left out.
"""

import hashlib
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal, get_args

from stemma.errors import InvalidDataError

__all__ = ["Split", "reference_texts", "source_texts"]

Split = Literal["train", "validation", "test"]

_SKIPPED = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests")
)
_FEWEST_BYTES = 1_000_000  # embedded and stripped-down Pythons have compiled files, or none


def source_texts(split: Split, *, library: Path | None = None) -> dict[str, str]:
    """Source files of the standard library by name (a path below the library's folder), in order of their names.

    Args:
        split: "train" has about 14 of 16 files, "validation" and "test" about one each.
        library: the folder; that of this Python when None.

    Raises:
        InvalidDataError: there are less than a million bytes of sources.
    """
    folder = Path(sysconfig.get_path("stdlib")) if library is None else library
    found, size = {}, 0
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if _SKIPPED.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            size += path.stat().st_size
            if _split_of(name.as_posix()) == _known(split):
                with tokenize.open(path) as file:
                    found[name.as_posix()] = file.read()
    if size < _FEWEST_BYTES:
        raise InvalidDataError(
            f"{folder} holds {size:,} bytes of Python sources; expected the whole standard library, more than "
            f"{_FEWEST_BYTES:,}. Use a Python that comes with its sources (not an embedded or stripped-down one)"
        )
    return found


def reference_texts(split: Split) -> dict[str, str]:
    """Topics of the language reference, as `help()` shows them, by name, in order of their names.

    Args:
        split: as of `source_texts`; by topics.

    Raises:
        InvalidDataError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InvalidDataError(
            "this Python has no module pydoc_data.topics; use one that comes with the topics of help()"
        ) from error
    return {name: topics[name] for name in sorted(topics) if _split_of(name) == _known(split)}


def _known(split: Split) -> Split:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    return split


def _split_of(name: str) -> Split:
    bucket = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 16
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
