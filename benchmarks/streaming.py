"""W7: time of streaming against the packed call, per group size. Its peak memory is measured by `memory.py`."""

from __future__ import annotations

from typing import Any

from benchmarks import measure
from benchmarks.rows import Recorder
from benchmarks.workloads import Workload


def run(recorder: Recorder, workload: Workload, blocks: int) -> None:
    """CPU and wall time of one step, streamed over packed, interleaved; 1.1 means streaming takes 10 % longer."""
    models = {name: measure.build_model(vocab_size=workload.vocab_size) for name in ("stemma", "stemma_streamed")}
    steps = {name: measure.prepared_step(name, workload, model) for name, model in models.items()}
    for step in steps.values():
        step()
    timings = measure.interleaved(steps, blocks)
    for clock in ("cpu", "wall"):
        packed, streamed = getattr(timings["stemma"], clock), getattr(timings["stemma_streamed"], clock)
        ratio = measure.Ratio.of(streamed, packed)
        common: dict[str, Any] = {"workload": workload.name, "shapes": workload.shapes, "repeats": ratio.count}
        recorder.add(
            "streaming",
            method="stemma_streamed",
            metric=f"{clock}_time_ratio",
            unit="x",
            value=ratio.median,
            spread=(ratio.low, ratio.high),
            baseline="stemma",
            baseline_value=sorted(packed)[len(packed) // 2],
            **common,
        )
