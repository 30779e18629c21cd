"""Peak memory of one step, in a fresh process: `python benchmarks/memory.py METHOD WORKLOAD` prints bytes as JSON.

The peak is resident memory above what the process held before the step, with the model and its gradients in place. A
tiny step of the same method runs first, so that libraries have loaded and made their buffers. Linux only: the kernel's
high-water mark is reset through /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def peak_bytes(method: str, workload: str, scale: int, threads: int) -> int:
    """Runs the measurement in a child process and returns its peak above the start of the step."""
    # Large blocks go back to the system when freed; by default glibc keeps more and more of them, and resident memory
    # would then tell about the allocator's history instead of the step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, method, workload, "--scale", str(scale), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {method} on {workload} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")


def _measure(method: str, workload_name: str, scale: int) -> int:
    import torch

    from benchmarks import measure, workloads

    workload = workloads.make(workload_name, scale)
    model = measure.build_model(vocab_size=workload.vocab_size)
    step = measure.METHODS[method].step
    measure.METHODS[method].prepare(model)
    step(model, workloads.make(workload_name, scale * 8))
    for parameter in model.parameters():  # gradients exist from here on and are added to
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    step(model, workload)
    return _resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("workload")
    parser.add_argument("--scale", type=int, default=1, help="divide the workload's lengths by this")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    print(json.dumps({"peak_bytes": _measure(arguments.method, arguments.workload, arguments.scale)}))


if __name__ == "__main__":
    main()
