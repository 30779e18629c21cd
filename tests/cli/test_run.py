"""`stemma run`: reproductions are found by their place, without importing them."""

import json
import subprocess
import sys

import pytest

from stemma.cli import run
from stemma.cli.main import main

METHODS = {"jrt", "kvcomm", "ntk-attention", "pppo", "prefix-kv", "prefix-rft", "prefix-rl", "tempo"}


def test_every_method_with_a_run_function_is_listed(capsys):
    assert main(["run"]) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines()} == set(run.recipes()) >= METHODS
    assert "TEMPO: credit for the tokens" in out


def test_the_list_as_json(capsys):
    assert main(["run", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["recipes"]) >= METHODS


def test_listing_and_help_import_no_torch():
    code = (
        "import sys\nfrom stemma.cli.main import main\n"
        "main(['run'])\nmain(['run', '--help'])\nmain(['run', 'nope'])\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("asked", "near"), [("tempoo", "tempo"), ("prefix_rft", "prefix-rft"), ("ppo", "pppo")])
def test_an_unknown_method_names_the_nearest(asked, near, capsys):
    assert main(["run", asked]) == 2
    assert f"Did you mean `stemma run {near}`?" in capsys.readouterr().err


def test_a_method_without_a_reproduction_gives_its_reason(capsys):
    assert main(["run", "grpo"]) == 2
    error = capsys.readouterr().err
    assert "stemma run: 'grpo' has no reproduction: it is the baseline" in error
    assert "Did you mean" not in error


@pytest.mark.parametrize("command", ["run", "methods"])
def test_the_method_is_shown_as_optional(command, capsys):
    assert main([command, "--help"]) == 0
    assert "[METHOD]" in capsys.readouterr().out.partition("usage:")[2].splitlines()[0]


def test_seeds_are_checked(capsys):
    assert main(["run", "tempo", "--seeds", "0"]) == 2
    assert "seeds must be at least 1" in capsys.readouterr().err


def test_a_model_is_refused_where_a_reproduction_makes_its_own(capsys):
    assert main(["run", "tempo", "--model", "folder"]) == 2
    assert "stemma run: tempo takes no --model: which problems the start solves" in capsys.readouterr().err
    assert main(["run", "prefix-kv", "--model", "./no-such-folder"]) == 1
    assert "'./no-such-folder' does not exist" in capsys.readouterr().err
