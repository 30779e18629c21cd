"""The page of methods, docs/methods.md, from their files and rows: `python benchmarks/methods.py`.

It says what `stemma methods` says. `--check` writes nothing and exits with status 1 when the page is not what files and
rows say.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.rows import RESULTS, write_atomically  # noqa: E402
from benchmarks.tables import prose  # noqa: E402
from stemma.cli.methods import ROOMS, Method, measured, methods, outcome  # noqa: E402
from stemma.recipes._tables import claims_table  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
INTRODUCTION = (
    """Every method with its paper, what the paper claims and what was measured here, at laptop scale. The page is made
    from the rows that [reproductions](recipes.md) leave, as is the answer of `stemma methods`, so it cannot claim what
    no run showed: "yes" means above zero by two standard errors, "in the mean" above zero.""",
)


def page(results: Path = RESULTS) -> str:
    """docs/methods.md."""
    known = methods(results)
    parts = ["<!-- Made by benchmarks/methods.py from src/stemma and benchmarks/results; do not edit. -->\n# Methods"]
    parts += [prose(paragraph) for paragraph in INTRODUCTION]
    for room, heading in ROOMS.items():
        members = [method for method in known.values() if method.room == room]
        if members:
            parts += [f"## {heading}", *(part for method in members for part in _section(method))]
    return "\n\n".join(parts) + "\n"


def _section(method: Method) -> list[str]:
    """What the page says about one method."""
    paper = method.paper
    source = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}) ({paper.year}, arXiv {paper.arxiv})."
    module = f"`stemma.{method.room}.{method.name.replace('-', '_')}`"
    parts = [f"### {method.name}", f"{method.purpose}  \n{source}  \n{module}"]
    if not method.rows:
        return [*parts, prose(_sentence(outcome(method)))]
    if method.claims:
        parts.append(claims_table(method.claims))
    title = method.rows[0]["title"]
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
    return [*parts, prose(f"Measured {measured(method)}; all numbers: [{title}](recipes.md#{anchor}).")]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:].rstrip(".") + "."


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; status 1 when the page is stale")
    given = parser.parse_args(arguments)
    if not given.check:
        write_atomically(PAGE, page())
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.relative_to(ROOT)} is not what files and rows say; run: python benchmarks/methods.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
