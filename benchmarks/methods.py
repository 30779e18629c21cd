"""The pages of methods, docs/methods.md and docs/api-methods.md, from files and rows: `python benchmarks/methods.py`.

The first says what `stemma methods` says; the second has the docstrings, which mkdocstrings fills in. `--check` writes
nothing and exits with status 1 when a page is not what files and rows say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.rows import RESULTS, write_atomically  # noqa: E402
from benchmarks.tables import prose  # noqa: E402
from stemma.cli.methods import ROOMS, Method, measured, methods, outcome  # noqa: E402
from stemma.recipes._tables import claims_table  # noqa: E402

PAGE, API = ROOT / "docs" / "methods.md", ROOT / "docs" / "api-methods.md"
INTRODUCTION = (
    """Every method with its paper, what the paper claims and what was measured here, at laptop scale. The page is made
    from the rows that [reproductions](recipes.md) leave, as is the answer of `stemma methods`, so it cannot claim what
    no run showed. A claim holds when an exact one-sided test gives p < 0.05, is "in the mean" when only the mean points
    that way; fewer than five seeds cannot tell. "Claimed above" is the number that the value has to exceed, and n how
    many runs or samples the value is the mean of.""",
)


def page(results: Path = RESULTS) -> str:
    """docs/methods.md."""
    known = methods(results)
    parts = ["<!-- Made by benchmarks/methods.py from src/stemma and benchmarks/results; do not edit. -->\n# Methods"]
    parts += [prose(paragraph) for paragraph in INTRODUCTION]
    for heading, members in _by_room(known):
        parts += [f"## {heading}", *(part for method in members for part in _section(method))]
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """docs/api-methods.md."""
    parts = ["<!-- Made by benchmarks/methods.py from src/stemma; do not edit. -->\n# Methods in Python"]
    parts.append("Made from the docstrings; the examples run in the tests. Names of `stemma` itself: [API](api.md).")
    for heading, members in _by_room(methods()):
        parts += [f"## {heading}", *(f"::: {_module(method)}" for method in members)]
    return "\n\n".join(parts) + "\n"


def _by_room(known: Mapping[str, Method]) -> list[tuple[str, list[Method]]]:
    """Heading and methods of each room that has some."""
    found = [(heading, [m for m in known.values() if m.room == room]) for room, heading in ROOMS.items()]
    return [(heading, members) for heading, members in found if members]


def _module(method: Method) -> str:
    return f"stemma.{method.room}.{method.name.replace('-', '_')}"


def _section(method: Method) -> list[str]:
    """What the page says about one method."""
    paper = method.paper
    source = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}) ({paper.year}, arXiv {paper.arxiv})."
    module = _module(method)
    parts = [f"### {method.name}", f"{method.purpose}  \n{source}  \n[`{module}`](api-methods.md#{module})"]
    if not method.rows:
        return [*parts, prose(_sentence(outcome(method)))]
    if method.claims:
        parts.append(claims_table(method.claims))
    if method.real_claims:
        parts += ["On a pretrained model:", claims_table(method.real_claims)]
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
    wanted = {PAGE: page(), API: api()}
    if not given.check:
        for path, text in wanted.items():
            write_atomically(path, text)
        return
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what files and rows say; run: python benchmarks/methods.py")
    sys.exit(bool(stale))


if __name__ == "__main__":
    main()
