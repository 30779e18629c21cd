"""The public surface: names, their laziness, commands and flags. A change here is a change for users: see CHANGELOG."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import stemma
from stemma.cli.main import commands

ROOT = Path(__file__).parents[1]

NAMES = {
    "CheckReport",
    "InvalidBatchError",
    "InvalidDataError",
    "MissingExtraError",
    "Plan",
    "PrefixTree",
    "Scores",
    "SharedPrefix",
    "StemmaError",
    "UnsupportedModelError",
    "__version__",
    "backward",
    "check",
    "disable",
    "enable",
    "explain",
    "generate",
    "score",
}

# Command -> its options, in the order of its class (`--json` is common to all).
COMMANDS: dict[str, tuple[str, ...]] = {
    "base-model": ("cache_dir", "quick"),
    "check": ("model", "random_init", "sequences", "dtype", "device", "repeats", "seed"),
    "collect": (
        *("model", "dataset", "output", "resume", "limit", "samples_per_round", "max_samples", "temperature"),
        *("max_completion_length", "stop_strings", "shots", "sft_steps", "eval_prompts", "seed"),
    ),
    "evaluate-run": ("qrels", "runs", "measures", "seed"),
    "explain": (
        "model",
        "sequences",
        "prompt_tokens",
        "response_tokens",
        "group_size",
        "max_tokens",
        "min_shared",
    ),
    "generate": (
        *("model", "prompts", "prefix", "save_prefix", "output", "resume", "batch_size", "max_new_tokens"),
        *("num_return_sequences", "num_beams", "temperature", "top_p", "top_k", "stop_strings", "share", "max_tokens"),
        *("dtype", "device", "seed", "report"),
    ),
    "index": ("corpus", "input", "id_field", "text_fields", "update", "encoder", "sparse_encoder", "dtype"),
    "methods": ("method",),
    "run": ("seeds", "output_dir", "cache_dir", "model", "quick", "method"),
    "search": (
        *("corpus", "query", "queries", "output", "k", "engine", "encoder", "sparse_encoder", "weights", "feedback"),
    ),
    "train": (
        *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "dynamic_sampling"),
        *("max_generation_batches", "importance_sampling_correction", "importance_sampling_mode"),
        *("importance_sampling_clip_max", "importance_sampling_clip_min"),
        *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
        *("num_iterations", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1"),
        *("adam_beta2", "max_grad_norm", "loss_type", "credit", "scale_rewards", "epsilon", "epsilon_high", "delta"),
        *("importance_sampling_level", "beta", "kl_estimator", "use_bias_correction_kl", "entropy_coef"),
        *("router_aux_loss_coef", "mask_truncated_completions", "soft_punish_cache", "shared_prefix", "max_tokens"),
        *("compare_every", "bf16", "gradient_checkpointing", "seed"),
        # Not of GRPO:
        *("model", "dataset", "output_dir", "resume", "method", "traces"),
        *("server", "stop_strings", "sft_steps", "sft_learning_rate", "shots", "use_peft", "lora_r", "eval_prompts"),
        "eval_steps",
        *("save_steps", "save_total_limit", "report_to"),
    ),
}

HEAVY = ("torch", "transformers", "numpy", "tyro", "accelerate", "trl", "peft", "matplotlib")


def run_python(code: str) -> str:
    """What a fresh interpreter prints; imports of this one would hide what the code imports itself."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(statement: str) -> list[str]:
    return run_python(f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])").split()


def test_public_names_are_the_agreed_ones() -> None:
    assert set(stemma.__all__) == NAMES
    assert len(NAMES) <= 25
    assert dir(stemma) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_resolves(name: str) -> None:
    assert getattr(stemma, name) is not None


def test_type_checkers_see_the_names_that_python_sees() -> None:
    tree = ast.parse(Path(stemma.__file__).read_text(encoding="utf-8"))
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == stemma._PUBLIC


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        stemma.no_such_name  # noqa: B018


def test_importing_stemma_imports_no_heavy_package() -> None:
    assert loaded_after("import stemma") == []


def test_importing_the_command_line_imports_no_heavy_package() -> None:
    assert loaded_after("import stemma.cli.main; stemma.cli.main.commands()") == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_help_page_imports_no_torch(command: str) -> None:
    module = command.replace("-", "_")
    assert set(loaded_after(f"import stemma.cli.{module}")) <= {"tyro"}


def test_commands_are_the_agreed_ones() -> None:
    assert set(commands()) == set(COMMANDS)
    assert all(summary.endswith(".") for summary in commands().values())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_options_are_the_agreed_ones(command: str) -> None:
    module = importlib.import_module(f"stemma.cli.{command.replace('-', '_')}")
    assert tuple(field.name for field in dataclasses.fields(module.Config)) == COMMANDS[command]
    assert module.Config.__dataclass_params__.frozen


def test_version_is_the_one_in_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert stemma.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_satisfy_the_declared_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert requirement.name in pins, f"{requirement.name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), requirement
