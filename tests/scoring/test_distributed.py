"""Data parallelism: hooks of DDP and FSDP2 keep working, because everything goes through ``model(...)``."""

import os
import subprocess
import sys
from pathlib import Path


def test_ddp_and_fsdp2_on_two_processes():
    worker = Path(__file__).with_name("distributed_worker.py")
    path = [worker.parents[1], os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal") == 2
