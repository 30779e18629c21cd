"""`accelerate launch` with two processes gives the numbers of one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stemma.train.tracking import read_rows

CPU = Path(__file__).parents[2] / "examples" / "accelerate" / "cpu.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}

# An untrained model solves nothing; the penalty for length is what makes rewards of a group differ.
SMALL = [
    *("--sft-steps", "2", "--max-steps", "3", "--shots", "2", "--num-generations", "4", "--num-iterations", "2"),
    *("--max-completion-length", "60", "--soft-punish-cache", "60", "--beta", "0.05", "--eval-prompts", "3"),
    *("--compare-every", "0", "--save-steps", "2", "--credit", "tempo"),
]
SAME = (
    *("loss", "grad_norm", "entropy", "kl", "learning_rate", "reward", "reward_std", "completions/mean_length"),
    *("tokens/sampled", "tokens/optimised", "eval/reward", "mean_token_accuracy", "prefix_rft/prefix_length"),
)


def train(folder: Path, processes: int, *flags: str) -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "stemma.cli.main"]
    if processes > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CPU)]
        launcher += [
            "--num_processes",
            str(processes),
            "--num_cpu_threads_per_process",
            "1",
            "--main_process_port",
            "0",
        ]
        launcher += ["-m", "stemma.cli.main"]
    done = subprocess.run(
        [*launcher, "train", "--output-dir", str(folder), *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # accelerate starts a single process, without a word, for configurations that it cannot honour.
    assert json.loads((folder / "report.json").read_text())["about"]["processes"] == processes
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "prefix-rft"])
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, method: str) -> None:
    flags = [*SMALL, "--method", method]
    one = train(tmp_path / "one", 1, *flags, "--per-device-train-batch-size", "16")
    two = train(tmp_path / "two", 2, *flags, "--per-device-train-batch-size", "8")
    assert [(row["phase"], row["step"]) for row in two] == [(row["phase"], row["step"]) for row in one]
    assert all(row["grad_norm"] > 0 for row in one if row["phase"] == "grpo")
    for first, second in zip(one, two):
        for name in SAME:
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), (first["phase"], name)
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
