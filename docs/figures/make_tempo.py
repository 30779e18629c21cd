"""Draw the credit of a group: its prefix tree with the value of every prefix, and the advantages of two completions.

    python docs/figures/make_tempo.py        # rewrites docs/figures/tempo.svg

Values and advantages are computed by `stemma.rl.tempo`, rewards by the verifier of DialLock. A test redraws the picture
and compares it with the committed one.
"""

import os
from html import escape
from pathlib import Path

import numpy as np
import torch

from stemma.data import diallock
from stemma.rl.engine.advantages import group_relative
from stemma.rl.tempo import ValueTree, tree_td_advantages

TARGET = Path(__file__).with_name("tempo.svg")

PROBLEM = diallock.Problem(45, 56)
MOVES = ("ac", "aa", "a", "baac", "bb", "ca")
EXPLAINED = (0, 1)  # completions whose advantages are drawn

LOW, MIDDLE, HIGH = (209, 73, 91), (236, 239, 242), (42, 157, 143)  # values 0, 1/2 and 1
INK, FAINT, PAPER, GRID, CREDIT = "#22303c", "#66727d", "#ffffff", "#c9d1d8", "#4a6fa5"
CELL, ROW = 19, 34
SANS, MONO = "font-family='Helvetica, Arial, sans-serif'", "font-family='Menlo, Consolas, monospace'"


def group() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, padded ids, mask and group of the completions."""
    episodes = [diallock.Episode(PROBLEM, moves) for moves in MOVES]
    rows = [torch.tensor(episode.completion_ids) for episode in episodes]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    rewards = [diallock.reward(episode.prompt_ids, episode.completion_ids) for episode in episodes]
    return torch.tensor(rewards, dtype=torch.float64), ids, mask, torch.zeros(len(rows), dtype=torch.int64)


def text(x: float, y: float, content: str, size: float = 12, fill: str = INK, extra: str = "", font: str = SANS) -> str:
    """One line of SVG text; `y` is its baseline."""
    return f"<text x='{x:g}' y='{y:g}' {font} font-size='{size:g}' fill='{fill}' {extra}>{escape(content)}</text>"


def rectangle(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    """One SVG rectangle."""
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}' {extra}/>"


def colour(value: float) -> str:
    """From red (0) over grey (1/2) to green (1)."""
    near, far, share = (MIDDLE, HIGH, 2 * value - 1) if value > 0.5 else (MIDDLE, LOW, 1 - 2 * value)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(near, far, strict=True))


def symbol(token: int) -> str:
    """A token as one character."""
    return "⏎" if token == diallock.EOS_ID else diallock.VOCABULARY[token]


def draw_tree(values: ValueTree, x: float, y: float) -> list[str]:
    """Depth runs to the right, completions downwards; a node has its tokens, its value and the step to that value."""
    tree, parts = values.tree, []
    for node in range(tree.num_nodes):
        value, parent, depth = float(values.value[node]), int(tree.node_parent[node]), int(tree.node_depth[node])
        start, length = int(tree.node_start[node]), int(tree.node_length[node])
        tokens = [int(token) for token in tree.packed_tokens[start : start + length]]
        # The pseudo token at the head of the group is drawn as the problem itself.
        head = parent < 0
        left = x + (depth - 1) * CELL if not head else x - 62
        width = 62 if head else length * CELL
        top, bottom = y + int(tree.node_first[node]) * ROW, y + int(tree.node_last[node]) * ROW
        middle = (top + bottom) / 2
        ink = PAPER if abs(value - 0.5) > 0.4 else INK
        parts.append(rectangle(left + 1, top + 1, width - 2, bottom - top - 2, colour(value), "rx='3'"))
        if head:
            parts.append(text(left + 31, middle - 6, PROBLEM.prompt, 12.5, INK, "text-anchor='middle'", MONO))
            parts.append(text(left + 31, middle + 12, f"V = {value:.2f}", 11, INK, "text-anchor='middle'"))
            continue
        parts += [
            text(left + (place + 0.5) * CELL, middle - 1, symbol(token), 12.5, ink, "text-anchor='middle'", MONO)
            for place, token in enumerate(tokens)
        ]
        step = value - float(values.value[parent])
        label = f"{step:+.2f}" if length < 4 else f"{step:+.2f} → V = {value:.2f}"
        parts.append(text(left + 5, middle + 12, label, 9.5, ink))
    return parts


def draw_rewards(values: ValueTree, rewards: torch.Tensor, x: float, y: float) -> list[str]:
    """The reward of every completion, at its place in the tree."""
    parts = [text(x, y - 10, "reward", 11, FAINT, "text-anchor='middle'")]
    for place, row in enumerate(values.tree.order):
        parts.append(text(x, y + (place + 0.5) * ROW + 4, f"{rewards[row]:g}", 12.5, INK, "text-anchor='middle'"))
    return parts


def draw_advantages(ids: np.ndarray, grpo: float, tempo: np.ndarray, x: float, y: float, scale: float) -> list[str]:
    """One bar a token; the dashed line is the advantage that GRPO gives to all of them."""
    width = len(ids) * CELL
    parts = [f"<line x1='{x:g}' y1='{y:g}' x2='{x + width:g}' y2='{y:g}' stroke='{GRID}'/>"]
    for place, (token, advantage) in enumerate(zip(ids, tempo, strict=True)):
        height = float(advantage) * scale
        branch = abs(float(advantage) - grpo) > 1e-9
        parts.append(
            rectangle(x + place * CELL + 2, y - max(height, 0), CELL - 4, abs(height), CREDIT,
                      "" if branch else "fill-opacity='0.35'")
        )  # fmt: skip
        if branch:
            reach = max(abs(height), abs(grpo) * scale)
            where = y - reach - 4 if grpo > 0 else y + reach + 11
            parts.append(text(x + (place + 0.5) * CELL, where, f"{advantage:.1f}", 9.5, INK, "text-anchor='middle'"))
        below = y + 15 if grpo > 0 else y - 6
        centred = "text-anchor='middle'"
        parts.append(text(x + (place + 0.5) * CELL, below, symbol(int(token)), 12.5, FAINT, centred, MONO))
    level = y - grpo * scale
    parts.append(
        f"<line x1='{x:g}' y1='{level:g}' x2='{x + width:g}' y2='{level:g}' stroke='{INK}' stroke-dasharray='4 3'/>"
    )
    return [*parts, text(x + width + 8, level + 4, f"GRPO {grpo:+.2f}", 11, FAINT)]


def picture() -> str:
    """The whole figure as SVG text."""
    rewards, ids, mask, group_id = group()
    values = ValueTree.build(rewards, ids, mask, group_id)
    grpo = group_relative(rewards, group_id)
    tempo = tree_td_advantages(rewards, ids, mask, group_id)
    x, y, scale = 92, 74, 26
    tree_width = ids.shape[1] * CELL
    width, first = x + tree_width + 76, y + len(MOVES) * ROW + 104
    height = first + 112 + 2 * scale
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}' role='img' aria-label='The prefix tree of a group with values at its branches, and "
        "the advantages of two completions'>",
        rectangle(0, 0, width, height, PAPER, "rx='10'"),
        text(24, 30, "The value of every prefix of a group", 15, INK, "font-weight='bold'"),
        text(24, 49, "mean reward of the completions through it; the first token of a branch steps to it", 12, FAINT),
        *draw_tree(values, x, y),
        *draw_rewards(values, rewards, x + tree_width + 34, y),
        text(24, first - 62, "Advantage of every token", 15, INK, "font-weight='bold'"),
        text(
            24,
            first - 43,
            "of the second and of the first completion: steps are added where the value moves, GRPO's elsewhere",
            12,
            FAINT,
        ),
    ]
    for index, row in enumerate(EXPLAINED):
        length = int(mask[row].sum())
        parts += draw_advantages(
            ids[row, :length].numpy(), float(grpo[row]), tempo[row, :length].numpy(), x, first + 46 + 56 * index, scale
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(path: Path = TARGET) -> None:
    """Write the figure to `path`, replacing it in one step."""
    temporary = path.with_suffix(".svg.tmp")
    temporary.write_text(picture(), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    write()
    print(f"wrote {TARGET.name}")
