"""Time, saved bytes and exactness of every method on W1–W6, U1, U2 and, given its folder, GSM8K text."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import measure, workloads
from benchmarks.baselines import METHODS
from benchmarks.rows import Recorder
from benchmarks.workloads import Workload

COMPARED = ("hf_padded", "prefix_grouper", "prefix_grouper_trimmed", "stemma")
ONCE: dict[str, tuple[str, ...]] = {
    "W1": ("dense_mask_tree",),
    "W2": ("dense_mask_tree",),
    "W3": ("dense_mask_tree", "hf_packed"),
    "W4": ("dense_mask_tree",),
    "W6": ("prefix_grouper",),
}
"""Slow methods that are measured in the first block only."""
UNSHARED = ("hf_padded", "stemma")
"""Methods of the workloads in which there is nothing to share."""
CHECKED = (
    "hf_padded",
    "hf_packed",
    "dense_mask_tree",
    "prefix_grouper",
    "prefix_grouper_trimmed",
    "stemma",
    "stemma_streamed",
    "negative_control",
)


def available(methods: tuple[str, ...]) -> list[str]:
    """The methods that can run here; the others are named with the reason."""
    found = []
    for name in methods:
        reason = METHODS[name].missing()
        if reason is None:
            found.append(name)
        else:
            print(f"  skipped {name}: {reason}")
    return found


def run(recorder: Recorder, workload: Workload, blocks: int) -> None:
    """Time and saved bytes of the workload's methods, interleaved in this process."""
    unshared = workload.name.startswith("U")
    once = available(ONCE.get(workload.name, ()))
    methods = [name for name in available(UNSHARED if unshared else COMPARED) if name not in once]
    models = {name: measure.build_model(vocab_size=workload.vocab_size) for name in [*methods, *once]}
    steps = {name: measure.prepared_step(name, workload, model) for name, model in models.items()}

    saved, grads = {}, {}
    for name, step in steps.items():  # also the warm-up
        saved[name] = measure.saved_bytes(step, models[name])
        grads[name] = measure.gradients(models[name])
    timings = measure.interleaved(steps, blocks, once=set(once))

    bound = measure.speed_bound(workload, models["hf_padded"].config)
    common: dict[str, Any] = {"workload": workload.name, "shapes": workload.shapes | {"speed_bound": round(bound, 4)}}
    for name in steps:
        for clock in ("cpu", "wall"):
            seconds = getattr(timings[name], clock)
            recorder.add(
                "speed",
                method=name,
                metric=f"{clock}_seconds",
                unit="s",
                value=torch.tensor(seconds, dtype=torch.float64).median().item(),
                spread=(min(seconds), max(seconds)),
                repeats=len(seconds),
                **common,
            )
        recorder.add("speed", method=name, metric="saved_bytes", unit="B", value=saved[name], **common)
        for baseline in ("hf_padded", "prefix_grouper", "prefix_grouper_trimmed"):
            if baseline in steps and baseline != name:
                _compare(recorder, name, baseline, timings, saved, bound, common)
        difference = max(
            float((found - grads["hf_padded"][key]).abs().max() / grads["hf_padded"][key].abs().max())
            for key, found in grads[name].items()
        )
        recorder.add(
            "speed", method=name, metric="gradient_difference", unit="relative", value=difference,
            baseline="hf_padded", **common,
        )  # fmt: skip


def run_attention_bytes(recorder: Recorder, workload: Workload) -> None:
    """What one layer's attention keeps for backward: the part of the saved bytes that a sharing method can change."""
    found = {
        name: measure.attention_saved_bytes(name, workload)
        for name in available(("hf_padded", "prefix_grouper", "stemma"))
    }
    for name, value in found.items():
        row: dict[str, Any] = {"workload": workload.name, "method": name, "shapes": workload.shapes}
        recorder.add("speed", metric="attention_saved_bytes", unit="B", value=value, **row)
        for baseline in ("hf_padded", "prefix_grouper"):
            if baseline in found and baseline != name:
                recorder.add(
                    "speed",
                    metric="attention_saved_bytes_ratio",
                    unit="x",
                    value=found[baseline] / value,
                    baseline=baseline,
                    baseline_value=found[baseline],
                    **row,
                )


def _compare(
    recorder: Recorder,
    name: str,
    baseline: str,
    timings: dict[str, measure.Timing],
    saved: dict[str, int],
    bound: float,
    common: dict[str, Any],
) -> None:
    for clock in ("cpu", "wall"):
        theirs, ours = getattr(timings[baseline], clock), getattr(timings[name], clock)
        ratio = measure.Ratio.of(theirs, ours)
        row = {
            "method": name,
            "baseline": baseline,
            "baseline_value": torch.tensor(theirs, dtype=torch.float64).median().item(),
            "repeats": ratio.count,
            **common,
        }
        recorder.add(
            "speed", metric=f"{clock}_speedup", unit="x", value=ratio.median, spread=(ratio.low, ratio.high), **row
        )
        if baseline == "hf_padded" and clock == "cpu":
            recorder.add(
                "speed",
                metric="fraction_of_bound",
                unit="1",
                value=ratio.median / bound,
                spread=(ratio.low / bound, ratio.high / bound),
                **row,
            )
    recorder.add(
        "speed",
        method=name,
        metric="saved_bytes_ratio",
        unit="x",
        value=saved[baseline] / saved[name],
        baseline=baseline,
        baseline_value=saved[baseline],
        **common,
    )


def run_exactness(recorder: Recorder, names: list[str], scale: int = 8) -> None:
    """Errors against each row alone in float64, at an eighth of the workloads' lengths, with the negative control."""
    small = [workloads.make(name, scale) for name in names]
    expected = {workload.name: measure.truth(workload) for workload in small}
    for method in available(CHECKED):
        for dtype in (torch.float64, torch.float32):
            model = measure.build_model(dtype)
            for workload in small:
                if method == "negative_control" and workload.token_ratio == 1.0:
                    continue  # without branches a causal mask is right
                error = measure.error(method, model, workload, expected[workload.name])
                for metric, unit, value in (
                    ("logprob_error", "nats", error.logprob),
                    ("gradient_error", "relative", error.gradient),
                ):
                    recorder.add(
                        "exactness",
                        workload=workload.name,
                        method=method,
                        metric=metric,
                        unit=unit,
                        value=value,
                        baseline="each_row_alone",
                        dtype=str(dtype).removeprefix("torch."),
                        shapes=workload.shapes,
                    )
