"""Compare the shared with the plain computation on a model and this machine.

Scores one batch twice, with every shared token encoded once and with each row alone, and compares the log-probabilities
and the gradient of every parameter, time and memory. Exit status 0 when they agree, 1 when they do not or when the
model is refused.

MODEL is a folder, a hub id or, with --random-init, also a config.json. The batch is made up, or read from --sequences:
a JSONL file with [5, 9, 2] or {"input_ids": [5, 9, 2]} on each line, or else with {"prompt_ids": [5],
"completion_ids": [[9, 2], [4]]}.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma check`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder or hub id; with --random-init also the path of a config.json."""
    random_init: bool = False
    """Build the model from its config with fresh weights; no checkpoint is read."""
    sequences: Path | None = None
    """JSONL file of token ids, one sequence or one group of a prompt and its completions on each line."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Sharing is to be as close to a higher precision as the plain computation is."""
    device: str = "auto"
    """Where to compute: auto (CUDA when there is one), cpu, cuda, cuda:1 and so on."""
    repeats: int = 1
    """Timed passes of each computation; besides, each runs once, and the plain one once more in a higher precision."""
    seed: int = 0
    """Seed of the fresh weights of --random-init."""


def main(config: Config) -> dict[str, Any]:
    """Run the check and return the report."""
    import stemma
    from stemma.cli._batch import read_batch
    from stemma.models.loading import load_model

    batch = None if config.sequences is None else read_batch(config.sequences)
    model = load_model(
        config.model, random_init=config.random_init, dtype=config.dtype, device=config.device, seed=config.seed
    )
    if batch is not None:
        batch.check(model)
    report = stemma.check(model, None if batch is None else batch.tree(), repeats=config.repeats, progress=True)
    print(report)
    status = 0 if report.ok else 1
    return {"model": config.model, **dataclasses.asdict(report), "ok": report.ok, "exit_status": status}
