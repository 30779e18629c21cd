"""Make the README's numbers, docs/benchmarks.md and its figures from the result rows: `python benchmarks/tables.py`.

`--check` writes nothing and exits with status 1 when a table is not what the rows say.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import figures, workloads  # noqa: E402
from benchmarks.baselines import METHODS  # noqa: E402
from benchmarks.pages import with_block  # noqa: E402
from benchmarks.rows import RESULTS, SECTIONS, Row, find, load, write_atomically  # noqa: E402

README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
PAGE, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "figures"
TIMED = ("W1", "W2", "W3", "W4", "W5", "W6", "GSM8K", "U1", "U2", "U3")
SHOWN = ("hf_packed", "dense_mask_tree", "prefix_grouper", "prefix_grouper_trimmed", "stemma")
GROUPERS = ("prefix_grouper", "prefix_grouper_trimmed")
LABELS = [METHODS[name].label for name in SHOWN]
CLOCKS = ("cpu", "wall")
MIB = 2**20

Rows = dict[str, list[Row]]


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def prose(text: str) -> str:
    """A paragraph, its line breaks laid anew."""
    return textwrap.fill(" ".join(text.split()), width=118, break_long_words=False, break_on_hyphens=False)


def times(row: Row | None, spread: bool = False) -> str:
    """A ratio as text, such as `3.56×`, or `3.56× (3.41–3.70; 6)` with its range and number of repetitions."""
    if row is None:
        return "–"
    text = f"{row['value']:.2f}×"
    if not spread or not row["spread"]:
        return text
    return f"{text} ({row['spread'][0]:.2f}–{row['spread'][1]:.2f}; {row['repeats']})"


def mib(row: Row | None) -> str:
    return "–" if row is None else f"{row['value'] / MIB:.0f}"


def scientific(row: Row | None) -> str:
    return "–" if row is None else f"{row['value']:.0e}"


class Results:
    """The rows of one thread count, with the look-ups that the tables need."""

    def __init__(self, rows: Rows, threads: int) -> None:
        self.rows = {section: [row for row in rows[section] if row["threads"] == threads] for section in SECTIONS}
        self.threads = threads
        self.timed = [name for name in TIMED if self.speed(name, "stemma", "cpu_speedup") is not None]

    def speed(self, workload: str, method: str, metric: str, baseline: str | None = "hf_padded") -> Row | None:
        return find(self.rows["speed"], workload=workload, method=method, metric=metric, baseline=baseline)

    def any_of(self, section: str, **wanted: object) -> Row | None:
        return find(self.rows[section], **wanted)

    def error(self, metric: str, dtype: str, method: str = "stemma") -> Row | None:
        """The worst error of a method over the workloads."""
        rows = [
            row
            for row in self.rows["exactness"]
            if row["method"] == method and row["metric"] == metric and row["dtype"] == dtype
        ]
        return max(rows, key=lambda row: row["value"], default=None)

    def decoded(self, method: str, metric: str, baseline: str | None) -> Row | None:
        """A row of the generation benchmark."""
        return self.any_of("hydragen", workload=DECODED, method=method, metric=metric, baseline=baseline)

    def shapes(self, workload: str) -> dict:
        row = self.speed(workload, "stemma", "cpu_speedup")
        assert row is not None
        return row["shapes"]


def title(workload: str) -> str:
    if workload == "GSM8K":
        return "GSM8K text, 8-shot"
    return workloads.make(workload).title


UPDATES = {
    "W1": "GRPO update: 8 completions of 128 tokens, prompt of 1,024",
    "W2": "GRPO update: 8 completions of 64 tokens, prompt of 2,048",
    "U2": "almost nothing to share: 8 completions of 256 tokens, prompt of 16",
}
DECODED = "B32 P2048 K8"
CACHES = {"hf_default": "transformers' default cache", "in_place": "a cache that grows in place"}


def headline(results: Results) -> str:
    """What README and the first page of the site say at once."""
    body = []
    for name, text in UPDATES.items():
        memory = " → ".join(mib(results.speed(name, m, "saved_bytes", None)) for m in ("hf_padded", "stemma"))
        body.append([text, "padded batch", f"**{times(results.speed(name, 'stemma', 'cpu_speedup'))}**", memory])
    for baseline, text in CACHES.items():
        memory = " → ".join(mib(results.decoded(m, "cache_bytes", None)) for m in (baseline, "stemma"))
        speed = times(results.decoded("stemma", "cpu_speedup", baseline))
        body.append(["32 samples of a prompt of 2,048 tokens", text, f"**{speed}**", memory])
    note = prose(
        f"""CPU time of {threads_text(results.threads)}, over the same Llama in Hugging Face transformers. MiB are what
        autograd keeps for the backward pass; for samples, keys and values. Largest difference of a gradient to that of
        each sequence alone, in float64: {scientific(results.error("gradient_error", "float64"))} relative."""
    )
    return f"{table(['', 'compared with', 'speed-up', 'MiB'], body)}\n\n{note}"


def threads_text(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def setting(results: Results) -> str:
    """Machine, versions, commit and date of the rows, as a sentence."""
    rows = results.rows["speed"]
    versions = rows[0]["versions"]
    commits = sorted({row["commit"][:7] + ("+" if row["dirty"] else "") for row in rows})
    dates = sorted({row["date"] for row in rows})
    machine = rows[0]["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {', '.join(commits)}; {' to '.join(sorted({dates[0], dates[-1]}))}."
    )


def speed_section(results: Results) -> list[str]:
    body, against = [], []
    for name in results.timed:
        shapes = results.shapes(name)
        body.append(
            [f"{name}: {title(name)}", f"{shapes['token_ratio']:.2f}", f"{shapes['speed_bound']:.2f}×"]
            + [times(results.speed(name, m, "cpu_speedup"), spread=True) for m in SHOWN]
        )
        fraction = results.speed(name, "stemma", "fraction_of_bound")
        against.append(
            [name, "–" if fraction is None else f"{100 * fraction['value']:.0f} %"]
            + [times(results.speed(name, "stemma", "wall_speedup"), spread=True)]
            + [times(results.speed(name, "stemma", "cpu_speedup", other), spread=True) for other in GROUPERS]
            + [times(results.speed(name, "dense_mask_tree", "cpu_speedup", "prefix_grouper"), spread=True)]
        )
    return [
        "## Time of a training step",
        prose(
            """Speed-up in CPU time over Hugging Face padded: the median, in brackets the range and the number of
            repetitions. The token ratio and the FLOPs bound say what was possible. A speed-up above the bound means
            that the padded batch ran below the machine's usual speed: it allocates several times more memory, and pays
            page faults for it in every step."""
        ),
        table(["workload", "token ratio", "bound", *LABELS], body),
        prose(
            """Wide ranges come from the padded batch, some of whose steps take two to three times as long as others.
            Slow methods run in the first block only, twice, and the median of two is their mean: one slow padded step
            moves it far, as in the column of the dense mask. Steadier, and fit to rank the methods that share, are
            their ratios to each other. Stemma's share of the bound, its speed-up in wall-clock time, and speed-ups over
            `prefix_grouper`, as published and with our trimmed head:"""
        ),
        table(
            [
                *("workload", "Stemma of the bound", "wall", "over prefix_grouper", "over its trimmed form"),
                "dense mask over prefix_grouper",
            ],
            against,
        ),
        f"![Speed-up over the padded batch]({figure_link('speed')})",
        "Bars are medians of the first table, whiskers its ranges over the repetitions.",
    ]


def saved_section(results: Results) -> list[str]:
    body, attention = [], []
    for name in results.timed:
        body.append(
            [name]
            + [mib(results.speed(name, m, "saved_bytes", None)) for m in ("hf_padded", *SHOWN)]
            + [times(results.speed(name, "stemma", "saved_bytes_ratio", b)) for b in ("hf_padded", "prefix_grouper")]
        )
        part = [
            results.speed(name, m, "attention_saved_bytes", None) for m in ("hf_padded", "prefix_grouper", "stemma")
        ]
        if part[-1] is not None:
            ratios = ("hf_padded", "prefix_grouper")
            attention.append(
                [name, *map(mib, part)]
                + [times(results.speed(name, "stemma", "attention_saved_bytes_ratio", b)) for b in ratios]
            )
    return [
        "## Bytes saved for the backward pass",
        "Distinct storages that autograd keeps, parameters left out, in MiB. They do not depend on the machine.",
        table(["workload", "padded", *LABELS, "padded / Stemma", "prefix_grouper / Stemma"], body),
        prose(
            """Most of that is kept by the model's own layers (norms, projections, feed-forward), which all sharing
            methods leave alone. One layer's attention by itself, with the projections it receives and the output it
            hands on:"""
        ),
        table(
            ["workload", "padded", "prefix_grouper", "Stemma", "padded / Stemma", "prefix_grouper / Stemma"], attention
        ),
    ]


def exactness_section(results: Results) -> list[str]:
    methods = [m for m in METHODS if results.error("gradient_error", "float64", m) is not None]
    columns = [(metric, dtype) for dtype in ("float64", "float32") for metric in ("logprob_error", "gradient_error")]
    body = [[METHODS[m].label, *(scientific(results.error(*column, m)) for column in columns)] for m in methods]
    head = ["method", "log-prob, float64", "gradient, float64", "log-prob, float32", "gradient, float32"]
    return [
        "## Exactness",
        prose(
            """Largest error over all workloads at an eighth of their lengths, against each row alone in float64 with
            norms that stay in float64: absolute for log-probabilities; for gradients the largest, over all
            parameters, of the largest difference relative to that parameter's largest entry. The tree with a causal
            mask is wrong on purpose: it shows that the comparison notices."""
        ),
        table(head, body),
    ]


def memory_section(results: Results) -> list[str]:
    def peak(workload: str, method: str) -> Row | None:
        return results.any_of("memory", workload=workload, method=method)

    methods = [m for m in METHODS if any(row["method"] == m for row in results.rows["memory"])]
    names = [name for name in workloads.NAMES if peak(name, "stemma") is not None]
    if not names:
        return []
    body = [[f"{name}: {title(name)}"] + [mib(peak(name, m)) for m in methods] for name in names]
    parts = [
        "## Peak memory",
        "Peak resident memory of one step above model and gradients, each in a fresh process, in MiB.",
        table(["workload", *(METHODS[m].label for m in methods)], body),
    ]
    low, high = peak("W7-8", "stemma_streamed"), peak("W7-64", "stemma_streamed")
    padded, streamed = peak("W7-32", "hf_padded"), peak("W7-32", "stemma_streamed")
    if low and high and padded and streamed:
        ratios = [
            [name]
            + [
                times(results.any_of("streaming", workload=name, metric=f"{clock}_time_ratio"), True)
                for clock in CLOCKS
            ]
            for name in ("W7-8", "W7-32", "W7-64")
        ]
        growth, below = high["value"] / low["value"], padded["value"] / streamed["value"]
        parts += [
            prose(
                f"""Streamed with a budget of eight responses (512 tokens), the peak at 64 responses is {growth:.2f}
                times that at 8, and at 32 responses {below:.1f} times below the padded batch's. Time of the streamed
                step over the packed one:"""
            ),
            table(["workload", "CPU time", "wall"], ratios),
            f"![Peak memory against the number of responses]({figure_link('memory')})",
        ]
    return parts


def long_tree_section(results: Results) -> list[str]:
    largest = results.any_of("long_tree", metric="largest_tensor")
    square = results.any_of("long_tree", metric="tokens_squared")
    if largest is None or square is None:
        return []
    shapes = largest["shapes"]
    return [
        "## A long tree",
        prose(
            f"""A tree of {shapes["unique_tokens"]:,} distinct tokens ({shapes["total_tokens"]:,} in all), forward and
            backward through a small model: the largest tensor of any operation has {largest["value"] / 1e6:.1f}
            million elements, {square["value"] / largest["value"]:.0f} times less than tokens × tokens."""
        ),
    ]


def bf16_section(results: Results) -> list[str]:
    names = sorted({row["workload"] for row in results.rows["bf16"]}, key=lambda name: int(name.rpartition("G")[2]))

    def cell(name: str, method: str) -> str:
        row = results.any_of("bf16", workload=name, method=method)
        return "–" if row is None else f"{row['value']:.1e}"

    body = [[name.rpartition("G")[2], cell(name, "stemma"), cell(name, "gathered")] for name in names]
    return [
        "## bfloat16 gradients of the prefix",
        prose(
            """Relative L2 error of the prefix's key and value gradients at the level of attention, against float64 on
            the same inputs."""
        ),
        table(["responses", "tree attention", "keys gathered per path"], body),
    ] * bool(names)


def figure_link(name: str) -> str:
    return f"figures/{name}.svg"


def page(rows: Rows) -> str:
    """docs/benchmarks.md."""
    results = Results(rows, threads=1)
    parts = [
        "<!-- Made by benchmarks/tables.py from benchmarks/results; do not edit. -->\n# Benchmarks",
        prose(
            """One training step: from token lists to the gradient of every parameter. The loss is the weighted sum of
            the response tokens' log-probabilities, with fixed random weights. The model is a randomly initialised
            Llama (hidden size 384, 4 layers, 6 query and 2 key/value heads, vocabulary 8192) in float32; the time of
            building the tree, masks and padding is inside. Methods run interleaved in one process, A-B-B-A, and
            ratios are taken between neighbours; ranges are over all repetitions."""
        ),
        prose(
            """The padded baseline is right-padded, so that it needs no mask and runs PyTorch's fused causal kernel,
            and it scores only the response tokens (`logits_to_keep`). `prefix_grouper` is the published package, as
            its README uses it, through an adapter that gives SDPA the mask it needs; its trimmed form scores only
            predicting positions too, and picks the best single level of a deeper tree."""
        ),
        prose(
            f"""CPU time of {threads_text(results.threads)}. {setting(results)} `./dev bench` measures again; the rows
            are in `benchmarks/results/`."""
        ),
        *speed_section(results),
        *saved_section(results),
        *exactness_section(results),
        *memory_section(results),
        *long_tree_section(results),
        *bf16_section(results),
    ]
    for threads in sorted({row["threads"] for row in rows["speed"]} - {1}):
        parts += threads_section(Results(rows, threads))
    return "\n\n".join(parts) + "\n"


def threads_section(results: Results) -> list[str]:
    body = [
        [name, f"{results.shapes(name)['speed_bound']:.2f}×"]
        + [times(results.speed(name, m, "wall_speedup"), spread=True) for m in ("stemma", "prefix_grouper")]
        for name in results.timed
    ]
    return [
        f"## With {threads_text(results.threads)}",
        "Speed-up in wall-clock time over Hugging Face padded.",
        table(["workload", "bound", "Stemma", "prefix_grouper"], body),
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; status 1 when a table is stale")
    check = parser.parse_args(arguments).check
    rows = {section: load(RESULTS / f"{section}.jsonl") for section in SECTIONS}
    if not rows["speed"]:
        sys.exit("no rows in benchmarks/results; run: python benchmarks/run.py")
    block = headline(Results(rows, threads=1))
    wanted = {path: with_block(path.read_text(encoding="utf-8"), block, "headline") for path in (README, INDEX)}
    wanted[PAGE] = page(rows)
    if check:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the result rows say; run: python benchmarks/tables.py")
        sys.exit(bool(stale))
    for path, text in wanted.items():
        write_atomically(path, text)
    figures.draw(rows, FIGURES)
    print("written: README.md, docs/index.md, docs/benchmarks.md and its figures")


if __name__ == "__main__":
    main()
