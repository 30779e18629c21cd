"""Draw the picture of the README: a prefix tree, its packed row and the blocks of its attention.

    python docs/figures/make_tree.py        # rewrites docs/figures/tree.svg

Nothing is drawn from memory: nodes, packed order and blocks are those of a `PrefixTree`. A test redraws the picture and
compares it with the committed one.
"""

import os
from itertools import count
from pathlib import Path

from stemma.prefix.tree import PrefixTree

TARGET = Path(__file__).with_name("tree.svg")

# One colour a node, in packed order: a family of hues a branch, so that kinship shows.
COLOURS = ("#4a6fa5", "#2a9d8f", "#73c2b8", "#a8dcd5", "#e07a3f", "#eda779", "#f5cfb4", "#8d6a9f")
INK, FAINT, PAPER, GRID = "#22303c", "#66727d", "#ffffff", "#eceff2"
CELL = 11
FONT = "font-family='Helvetica, Arial, sans-serif'"


def example_tree() -> tuple[PrefixTree, list[str]]:
    """Five trajectories of two turns from one prompt, and a name for each node in packed order."""
    fresh = count(1)

    def run(length: int) -> list[int]:
        return [next(fresh) for _ in range(length)]

    prompt, turn_a, answer_a1, answer_a2 = run(9), run(4), run(4), run(3)
    turn_b, answer_b1, answer_b2, answer_c = run(3), run(3), run(4), run(6)
    sequences = [
        prompt + turn_a + answer_a1,
        prompt + turn_a + answer_a2,
        prompt + turn_b + answer_b1,
        prompt + turn_b + answer_b2,
        prompt + answer_c,
    ]
    return PrefixTree.from_sequences(sequences, min_shared=1), ["prompt", "a", "a1", "a2", "b", "b1", "b2", "c"]


def rectangle(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    """One SVG rectangle."""
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}' {extra}/>"


def text(x: float, y: float, content: str, size: float = 12, fill: str = INK, extra: str = "") -> str:
    """One line of SVG text; `y` is its baseline."""
    return f"<text x='{x:g}' y='{y:g}' {FONT} font-size='{size:g}' fill='{fill}' {extra}>{content}</text>"


def outlines(tree: PrefixTree) -> list[tuple[int, int]]:
    """Start and end of each node in the packed row."""
    return [(int(start), int(start + length)) for start, length in zip(tree.node_start, tree.node_length)]


def draw_tree(tree: PrefixTree, names: list[str], x: float, y: float) -> list[str]:
    """Depth runs to the right, sequences downwards; a node is as high as the number of sequences through it."""
    row = 30
    parts = []
    for node, name in enumerate(names):
        left = x + int(tree.node_depth[node]) * CELL
        top = y + int(tree.node_first[node]) * row
        height = int(tree.node_last[node] - tree.node_first[node]) * row
        width = int(tree.node_length[node]) * CELL
        parts.append(
            rectangle(left + 1, top + 1, width - 2, height - 2, COLOURS[node], "rx='3'")
            + text(left + width / 2, top + height / 2 + 4, name, 12, PAPER if node in (0, 1, 4, 7) else INK,
                   "text-anchor='middle'")
        )  # fmt: skip
    return parts


def draw_row(tree: PrefixTree, names: list[str], x: float, y: float) -> list[str]:
    """The packed row: nodes in depth-first order."""
    return [
        rectangle(x + start * CELL + 0.5, y, (end - start) * CELL - 1, 16, COLOURS[node], "rx='2'")
        for node, (start, end) in enumerate(outlines(tree))
    ]


def draw_attention(tree: PrefixTree, names: list[str], x: float, y: float) -> list[str]:
    """Queries downwards, keys to the right: a causal square a node, a full rectangle under each inner node."""
    size = tree.unique_tokens * CELL
    parts = [rectangle(x, y, size, size, GRID)]
    for node, (start, end) in enumerate(outlines(tree)):
        left, top, width = x + start * CELL, y + start * CELL, (end - start) * CELL
        steps = " ".join(
            f"{left + step * CELL:g},{top + step * CELL:g} {left + (step + 1) * CELL:g},{top + step * CELL:g}"
            for step in range(end - start)
        )
        points = f"{left:g},{top + width:g} {steps} {left + width:g},{top + width:g}"
        parts.append(f"<polygon points='{points}' fill='{COLOURS[node]}'/>")
        below = (int(tree.node_subtree_end[node]) - end) * CELL
        if below:
            stroke = f"stroke='{COLOURS[node]}' stroke-width='1.5' fill-opacity='0.45'"
            parts.append(rectangle(left + 0.75, y + end * CELL + 0.75, width - 1.5, below - 1.5, COLOURS[node], stroke))
    return parts


def picture() -> str:
    """The whole figure as SVG text."""
    tree, names = example_tree()
    side = tree.unique_tokens * CELL
    left, right, top = 24, 360, 62
    width, height = right + side + 24, top + side + 54
    shared = tree.unique_tokens
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}' role='img' aria-label='A prefix tree of five sequences and its attention blocks'>",
        rectangle(0, 0, width, height, PAPER, "rx='10'"),
        text(left, 30, "Prefix tree", 15, INK, "font-weight='bold'"),
        text(left, 48, f"five sequences, {tree.total_tokens} tokens; {shared} distinct", 12, FAINT),
        *draw_tree(tree, names, left, top),
        text(left, top + 196, "Depth first, each node's own tokens are", 12, FAINT),
        text(left, top + 214, "contiguous, and so are all tokens below it.", 12, FAINT),
        text(left, top + 232, "So attention needs no mask:", 12, FAINT),
        *legend(left, top + 256),
        text(right, 30, "Attention over the packed row", 15, INK, "font-weight='bold'"),
        text(right, 48, f"{shared} × {shared}, one model call", 12, FAINT),
        *draw_attention(tree, names, right, top),
        *draw_row(tree, names, right, top + side + 12),
        text(right, top + side + 44, "the packed row: each distinct token once, at its depth", 12, FAINT),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def legend(x: float, y: float) -> list[str]:
    """What the shapes mean."""
    box = 18
    blue = COLOURS[0]
    return [
        f"<polygon points='{x},{y} {x},{y + box} {x + box},{y + box}' fill='{blue}'/>",
        text(x + box + 8, y + 13, "one causal square per node", 12),
        rectangle(x, y + 28, box, box, blue, f"fill-opacity='0.45' stroke='{blue}' stroke-width='1.5'"),
        text(x + box + 8, y + 41, "one full rectangle: its keys ×", 12),
        text(x + box + 8, y + 58, "all queries below it", 12),
        rectangle(x, y + 72, box, box, GRID),
        text(x + box + 8, y + 85, "never computed", 12),
    ]


def write(path: Path = TARGET) -> None:
    """Write the figure to `path`, replacing it in one step."""
    temporary = path.with_suffix(".svg.tmp")
    temporary.write_text(picture(), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    write()
    print(f"wrote {TARGET.name}")
