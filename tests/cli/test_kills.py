"""`stemma generate` killed at random times: what is resumed gives the bytes of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_a_generation_that_is_killed_again_and_again_ends_in_the_same_bytes(folder, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(20)), encoding="utf-8")
    command = [sys.executable, "-m", "stemma", "generate", str(folder), f"--prompts={prompts}", "--batch-size=1"]
    command += ["--temperature=1", "--max-new-tokens=30"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out" / "out.jsonl"
    began = time.monotonic()
    subprocess.run([*command, f"--output={whole}"], env=environment, check=True, capture_output=True)
    seconds, rng = time.monotonic() - began, random.Random(0)
    for attempt in range(8):
        if output.exists():
            break
        resumable = (output.parent / ".out.jsonl.partial").exists()
        arguments = [*command, f"--output={output}", *["--resume"] * resumable]
        with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) as process:
            try:
                process.communicate(timeout=None if attempt == 7 else rng.uniform(0.5, 1) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
    assert output.read_bytes() == whole.read_bytes()
