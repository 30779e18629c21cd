"""Sampling: groups that decode against one copy of their prompt, against `generate` on repeated prompts.

`python benchmarks/rollout.py` measures both workloads in a few minutes and writes `results/rollout.jsonl`:

- R1: the rollouts of `stemma train` on DialLock (8 prompts of 12 solved examples, 8 samples each, a Llama of 0.2
  million parameters);
- R2: prompts of 512 tokens, 8 samples each, on the benchmarks' Llama of 13 million parameters.

No row ends early, so every method samples equally many tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.rows import RESULTS, Recorder  # noqa: E402
from stemma.decode import loop as decoding  # noqa: E402
from stemma.decode.rollout import LocalGenerator  # noqa: E402

BASELINE = "hf_generate"


@dataclass(frozen=True)
class Sampling:
    """What is sampled."""

    name: str
    model: Any
    prompts: list[list[int]]
    num_generations: int
    max_new_tokens: int

    @property
    def sampled_tokens(self) -> int:
        return len(self.prompts) * self.num_generations * self.max_new_tokens

    @property
    def shapes(self) -> dict[str, Any]:
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "prompts": len(lengths),
            "num_generations": self.num_generations,
            "prompt_tokens": [min(lengths), max(lengths)],
            "sampled_tokens": self.sampled_tokens,
        }


def diallock_sampling(scale: int = 1) -> Sampling:
    """R1."""
    from stemma.cli._train_jobs import diallock_job

    job = diallock_job(shots=12, sft_steps=0, eval_prompts=0, seed=0)
    prompts = [row["prompt_ids"] for row in job.prompts(0, 8)]
    return Sampling("R1", job.model, prompts, num_generations=8, max_new_tokens=72 // scale)


def long_prompts(scale: int = 1) -> Sampling:
    """R2."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 1000, (4, 512 // scale), generator=generator).tolist()
    return Sampling("R2", measure.build_model().eval(), prompts, num_generations=8, max_new_tokens=64 // scale)


def stemma(sampling: Sampling) -> None:
    """One copy of each prompt's keys and values."""
    LocalGenerator(eos_token_id=None)(
        sampling.model,
        sampling.prompts,
        num_generations=sampling.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        seed=0,
    )


def stemma_repeated(sampling: Sampling) -> None:
    """Each prompt encoded once, its keys and values repeated for every row."""
    with mock.patch.object(decoding, "shared_prefixes", return_value=nullcontext(False)):
        stemma(sampling)


def hf_generate(sampling: Sampling) -> None:
    """`generate` of transformers, which encodes the prompt again for every row."""
    longest = max(map(len, sampling.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in sampling.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in sampling.prompts])
    sampling.model.generation_config.eos_token_id = None
    sampling.model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=sampling.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=0,
        output_scores=False,
    )


METHODS: dict[str, Callable[[Sampling], None]] = {
    "stemma": stemma,
    "stemma_repeated": stemma_repeated,
    BASELINE: hf_generate,
}


def run(recorder: Recorder, sampling: Sampling, blocks: int) -> None:
    """Sampled tokens per second of each method, and its speed-up over the baseline, both in CPU and in wall time."""
    steps: dict[str, Callable[[], Any]] = {name: lambda f=method: f(sampling) for name, method in METHODS.items()}
    for step in steps.values():
        step()
    timings = measure.interleaved(steps, blocks)
    common: dict[str, Any] = {"workload": sampling.name, "shapes": sampling.shapes}
    for clock in ("cpu", "wall"):
        seconds = {name: getattr(timing, clock) for name, timing in timings.items()}
        for name, values in seconds.items():
            rates = [sampling.sampled_tokens / value for value in values]
            recorder.add(
                "rollout",
                method=name,
                metric=f"tokens_per_{clock}_second",
                unit="1/s",
                value=statistics.median(rates),
                spread=(min(rates), max(rates)),
                repeats=len(rates),
                **common,
            )
            if name != BASELINE:
                ratio = measure.Ratio.of(seconds[BASELINE], values)
                recorder.add(
                    "rollout",
                    method=name,
                    metric=f"{clock}_speedup",
                    unit="x",
                    value=ratio.median,
                    spread=(ratio.low, ratio.high),
                    repeats=ratio.count,
                    baseline=BASELINE,
                    baseline_value=statistics.median(seconds[BASELINE]),
                    **common,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of two repetitions each (default 3)")
    parser.add_argument("--quick", action="store_true", help="lengths / 8, one block: shows that it runs; no rows")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(arguments.threads)
    recorder = Recorder(arguments.threads)
    for make in (diallock_sampling, long_prompts):
        run(recorder, make(8 if arguments.quick else 1), 1 if arguments.quick else arguments.blocks)
    for row in recorder.rows["rollout"]:
        low, high = row["spread"]
        print(f"{row['workload']} {row['method']:16s} {row['metric']:22s} {row['value']:9.2f}  [{low:.2f}, {high:.2f}]")
    if not arguments.quick:
        recorder.save(RESULTS)


if __name__ == "__main__":
    main()
