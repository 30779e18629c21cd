"""Two processes with half the batch each take the same steps as one process with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = str(Path(__file__).with_name("process_worker.py"))


def run(output: Path, processes: int, per_device: int, options: dict[str, Any]) -> dict[str, Any]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, WORKER, str(output), str(per_device), json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def flat(value: Any) -> list[float]:
    return [value] if not isinstance(value, list) else [number for item in value for number in flat(item)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo", "num_iterations": 2, "epsilon": 1e-4, "entropy_coef": 0.01},
        {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.1},
        {
            **{"dynamic_sampling": True, "max_generation_batches": 3, "soft_punish_cache": 3, "credit": "rloo"},
            **{"importance_sampling_correction": True, "importance_sampling_mode": "token_truncate"},
        },
    ],
    ids=["dapo", "grpo", "dynamic"],
)
def test_two_processes_train_like_one(tmp_path: Path, options: dict[str, Any]) -> None:
    one = run(tmp_path / "one.json", 1, 16, options)
    two = run(tmp_path / "two.json", 2, 8, options)
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["rows"], two["rows"]):
        for name in first:
            if "time" not in name:
                assert second[name] == pytest.approx(first[name], rel=1e-7, abs=1e-10), name
    for name, weights in one["weights"].items():
        assert flat(two["weights"][name]) == pytest.approx(flat(weights), rel=1e-9, abs=1e-12), name
