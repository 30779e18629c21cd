"""Train the small base model that reproductions start from, or find it, and measure it on text it has not seen.

A byte-level Llama is trained on the sources of the Python library, in a few minutes of one core, and kept in
--cache-dir, where `stemma run` finds it. Its folder is an ordinary model folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma base-model`."""

    cache_dir: Path = Path(".cache/stemma")
    """Folder that the model's folder is in."""
    quick: bool = False
    """Only try that training works, in seconds; the model knows nothing."""


def main(config: Config) -> dict[str, Any]:
    """Train or find the model and report on it."""
    from itertools import pairwise

    from stemma.recipes._base_model import python_base
    from stemma.recipes._runs import Options

    base = python_base(Options(cache_dir=config.cache_dir, quick=config.quick))
    rows, length, cuts = (2, 256, (0, 64, 255)) if config.quick else (24, 2048, (0, 64, 256, 512, 1024, 2047))
    bits = base.bits_per_byte(base.rows("test", rows, length))
    by_position = {f"{begin + 1}-{end}": bits[:, begin:end].mean().item() for begin, end in pairwise(cuts)}
    print(f"{base.folder}: {base.parameters:,} parameters, {_made(base.seconds)}")
    print(f"Held-out library sources, {rows} rows of {length} bytes: {bits.mean().item():.3f} bits per byte")
    for positions, mean in by_position.items():
        print(f"  bytes {positions:>9}: {mean:.3f}")
    return {
        "folder": base.folder,
        "parameters": base.parameters,
        "seconds": base.seconds,
        "bits_per_byte": bits.mean().item(),
        "bits_per_byte_by_position": by_position,
    }


def _made(seconds: float) -> str:
    return f"trained in {seconds:.0f} s" if seconds else "found"
