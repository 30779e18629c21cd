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
from benchmarks.pages import write_block  # noqa: E402
from benchmarks.rows import RESULTS, Row, find, load  # noqa: E402
from benchmarks.tables import prose, table, times  # noqa: E402

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


if __name__ == "__main__":
    sys.exit(write_block(PAGE, "rollout", block(load(RESULTS / "rollout.jsonl"))))
