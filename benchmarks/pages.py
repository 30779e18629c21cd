"""Blocks of pages that scripts write, between markers: `<!-- results:begin -->` and `<!-- results:end -->`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.rows import write_atomically


def with_block(text: str, block: str, name: str = "results") -> str:
    """`text` with what stands between the markers of that name replaced.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page must hold the lines {begin} and {end}; the table goes between them")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)


def write_block(page: Path, name: str, block: str) -> int:
    """The command line of a script that makes one block of a page: writes it, or with `--check` only compares.

    Returns:
        The exit status: 1 for a page that is not what the rows say.
    """
    text = page.read_text(encoding="utf-8")
    made = with_block(text, block, name)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    write_atomically(page, made)
    return 0
