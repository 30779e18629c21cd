"""FSDP2 as the shipped configuration asks for it: two processes with sharded parameters train like one process."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from stemma.data import diallock
from stemma.errors import StemmaError
from stemma.models.tiny import tiny_model
from stemma.rl import grpo
from stemma.rl.engine import trainer
from stemma.train import sharding
from stemma.train.sharding import check_plugin

WORKER = Path(__file__).with_name("fsdp_worker.py")
SHIPPED = WORKER.parents[3] / "examples" / "accelerate" / "fsdp2.yaml"


def run(folder: Path, processes: int, family: str, per_device: int, options: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(SHIPPED)]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder), family, str(per_device), json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        if "time" not in name and not name.startswith("compare/"):  # comparisons are those of process 0
            assert found[name] == pytest.approx(expected[name], rel=1e-7, abs=1e-10), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"num_iterations": 2, "epsilon": 1e-4, "entropy_coef": 0.01, "compare_every": 1}),
        ("gpt2", {"loss_type": "grpo", "beta": 0.1, "gradient_checkpointing": True}),  # tied embeddings
    ],
    ids=["llama", "gpt2"],
)
def test_sharded_processes_train_like_one(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    one = run(tmp_path / "one", 1, family, 8, options)
    two = run(tmp_path / "two", 2, family, 4, options)
    assert two["processes"] == 2
    for first, second in zip(one["rows"], two["rows"], strict=True):
        equal(second, first)
        assert second.get("compare/gradient_error", 0.0) < 1e-6
    for restored, straight in zip(two["again"], two["rows"][2:], strict=True):
        equal(restored, straight)
    assert one["weights"].keys() == two["weights"].keys()
    for name, weights in one["weights"].items():
        assert flat(two["weights"][name]) == pytest.approx(flat(weights), rel=1e-7, abs=1e-9), name


def flat(value: Any) -> list[float]:
    return [value] if not isinstance(value, list) else [number for item in value for number in flat(item)]


def plugin(**settings: Any) -> types.SimpleNamespace:
    defaults = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "cpu_offload": OffloadPolicy()}
    return types.SimpleNamespace(**{**defaults, "activation_checkpointing": False, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version must be 2, got 1"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
        ({"cpu_offload": CPUOffloadPolicy()}, "fsdp_offload_params must be false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing must be false.*--gradient-checkpointing"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    check_plugin(plugin())
    with pytest.raises(StemmaError, match=message):
        check_plugin(plugin(**settings))


@pytest.mark.parametrize(
    ("options", "generator", "message"),
    [
        ({"max_tokens": 64}, None, "drop max_tokens"),
        ({}, types.SimpleNamespace(weights="sync"), "weights='sync' sends whole models.*weights='fixed'"),
    ],
)
def test_the_trainer_refuses_what_does_not_go_with_fsdp(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], generator: Any, message: str
) -> None:
    monkeypatch.setattr(trainer, "fsdp_plugin", lambda _: plugin())
    model = tiny_model("llama", vocab_size=diallock.VOCAB_SIZE)
    config = grpo.Config(num_generations=2, per_device_train_batch_size=2, **options)
    with pytest.raises(ValueError, match=message):
        grpo.Trainer(
            model,
            config,
            prompts=lambda generation, count: [],
            reward_funcs=lambda **_: [],
            processing_class=diallock.tokenizer(),
            generator=generator,
        )


def test_adapters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "fsdp_plugin", lambda _: plugin())
    model = tiny_model("llama", vocab_size=diallock.VOCAB_SIZE)
    model.peft_config = {}
    with pytest.raises(StemmaError, match="adapters do not go with FSDP"):
        sharding.shard(None, model)
