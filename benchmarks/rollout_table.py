"""Write the table of docs/rollouts.md from the rows of rollout.py: `python benchmarks/rollout_table.py`.

`--check` writes nothing and exits with status 1 when the page is not what the rows say.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.hydragen_table import setting, value  # noqa: E402
from benchmarks.rows import RESULTS, Row, find, load, write_atomically  # noqa: E402
from benchmarks.tables import prose, table, times  # noqa: E402

BEGIN, END = "<!-- rollout:begin -->", "<!-- rollout:end -->"
PAGE = ROOT / "docs" / "rollouts.md"
MODELS = {"R1": "0.2 million", "R2": "13 million"}


def block(rows: list[Row]) -> str:
    """What stands between the page's markers."""
    head = ["prompts × samples", "prompt tokens", "parameters", "tokens/s", "speed-up", "with repeated keys and values"]
    body = []
    for name, parameters in MODELS.items():
        own, repeated = (
            find(rows, workload=name, method=method, metric="cpu_speedup") for method in ("stemma", "stemma_repeated")
        )
        assert own is not None
        shapes = own["shapes"]
        body.append(
            [
                f"{shapes['prompts']} × {shapes['num_generations']}",
                "–".join(dict.fromkeys(map(str, shapes["prompt_tokens"]))),
                parameters,
                f"{value(rows, name, 'stemma', 'tokens_per_cpu_second'):,.0f}",
                times(own, spread=True),
                times(repeated, spread=True),
            ]
        )
    note = prose(
        f"""Sampled tokens per second of CPU time, and speed-ups over `generate` of transformers on the repeated
        prompts, as a median with the range and the number of repetitions in brackets. {setting(rows)}
        `python benchmarks/rollout.py` measures again."""
    )
    return f"{table(head, body)}\n\n{note}"


def page(text: str, rows: list[Row]) -> str:
    """The page with its block made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block(rows)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the page, or say that it is not what the rows say."""
    rows, text = load(RESULTS / "rollout.jsonl"), PAGE.read_text(encoding="utf-8")
    made = page(text, rows)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    write_atomically(PAGE, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
