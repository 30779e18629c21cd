"""Run the benchmarks and write result rows: `python benchmarks/run.py`.

The standard run takes about a quarter of an hour on two cores and wants a quiet machine. Then `python
benchmarks/tables.py` makes the first table of the README, docs/benchmarks.md and the figures from the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.rows import RESULTS, Recorder  # noqa: E402

TIMED = ("W1", "W2", "W3", "W4", "W5", "W6", "U1", "U2", "U3")
STREAMED = ("W7-8", "W7-32", "W7-64")
OTHERS = ("long", "bf16")
PEAKS = {
    "W1": ("hf_padded", "each_row_alone", "dense_mask_tree", "prefix_grouper", "prefix_grouper_trimmed", "stemma"),
    "W2": ("hf_padded", "prefix_grouper", "prefix_grouper_trimmed", "stemma"),
    "W4": ("hf_padded", "prefix_grouper", "prefix_grouper_trimmed", "stemma"),
} | dict.fromkeys(STREAMED, ("hf_padded", "each_row_alone", "stemma", "stemma_streamed"))
"""Methods whose peak memory is measured, each in a process of its own."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", help=f"comma-separated, default all of {','.join([*TIMED, *STREAMED, *OTHERS])}", metavar="NAMES"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each step (default 1)")
    parser.add_argument("--blocks", type=int, default=3, help="A-B-B-A blocks, two repetitions each (default 3)")
    parser.add_argument("--quick", action="store_true", help="lengths / 8, one block: shows that it runs")
    parser.add_argument("--gsm8k", metavar="FOLDER", help="also measure GSM8K text from this folder (see workloads.py)")
    parser.add_argument(
        "--output", type=Path, help="folder of the result rows (default benchmarks/results; a quick run writes none)"
    )
    return parser.parse_args()


def main() -> bool:
    """The command line; true when rows were written to benchmarks/results."""
    arguments = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from benchmarks import bf16, long_tree, memory, speed, streaming, workloads

    torch.set_num_threads(arguments.threads)
    chosen = arguments.workloads.split(",") if arguments.workloads else [*TIMED, *STREAMED, *OTHERS]
    unknown = sorted(set(chosen) - {*TIMED, *STREAMED, *OTHERS})
    if unknown:
        sys.exit(f"unknown workload {unknown[0]!r}; expected some of {', '.join([*TIMED, *STREAMED, *OTHERS])}")
    scale, blocks = (8, 1) if arguments.quick else (1, arguments.blocks)
    recorder, start = Recorder(arguments.threads), time.perf_counter()

    output = arguments.output or (None if arguments.quick else RESULTS)

    def report(section: str) -> None:
        """Say what comes next, and keep what is there: an interrupted run loses one section."""
        if output is not None:
            recorder.save(output)
        print(f"[{time.perf_counter() - start:4.0f} s] {section}", flush=True)

    timed = [workloads.make(name, scale) for name in chosen if name in TIMED]
    if arguments.gsm8k:
        timed.append(workloads.gsm8k(arguments.gsm8k, problems=2 if arguments.quick else 4))
    for workload in timed:
        report(f"{workload.name}: {workload.title}; token ratio {workload.token_ratio:.2f}")
        speed.run(recorder, workload, blocks)
        if not workload.name.startswith("U"):
            speed.run_attention_bytes(recorder, workload)
        show(recorder, workload.name)
    for name in chosen:
        if name in STREAMED:
            report(f"{name}: streamed against packed")
            streaming.run(recorder, workloads.make(name, scale), blocks)
    if "long" in chosen:
        report("long tree: largest tensor")
        long_tree.run(recorder, scale)
    if "bf16" in chosen:
        report("bfloat16 prefix gradients")
        bf16.run(recorder, counts=(8,) if arguments.quick else (8, 16, 64, 256))
    if timed:
        report("exactness against each row alone in float64")
        speed.run_exactness(recorder, [name for name in chosen if name in TIMED])
    jobs = [(method, name) for name in chosen for method in speed.available(PEAKS.get(name, ()))]
    report(f"peak memory, {len(jobs)} processes")
    # Peaks do not depend on what else runs, so they may share the machine.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        peaks = list(pool.map(lambda job: memory.peak_bytes(*job, scale, arguments.threads), jobs))
    for (method, name), peak in zip(jobs, peaks):
        shapes = workloads.make(name, scale).shapes
        recorder.add("memory", workload=name, method=method, metric="peak_bytes", unit="B", value=peak, shapes=shapes)
    report("done")

    if output is not None:
        print(f"rows written to {output}; python benchmarks/tables.py makes the tables")
    return output == RESULTS


def show(recorder: Recorder, name: str) -> None:
    """Print the speed-ups of a workload as they come in."""
    for row in recorder.rows["speed"]:
        if row["workload"] == name and row["metric"] == "cpu_speedup" and row["baseline"] == "hf_padded":
            low, high = row["spread"]
            bound = row["shapes"]["speed_bound"]
            print(f"  {row['method']:24s} {row['value']:6.2f}x  [{low:.2f}, {high:.2f}]  of {bound:.2f}")


if __name__ == "__main__":
    main()
