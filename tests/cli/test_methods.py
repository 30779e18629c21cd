"""`stemma methods` and docs/methods.md say what files and rows say, and nothing else."""

import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from stemma.cli import methods as command
from stemma.cli.main import main
from stemma.cli.methods import methods, outcome
from stemma.errors import InvalidDataError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RUN = {
    "recipe": "tempo",
    "title": "TEMPO, tried",
    "shapes": {"task": "dice"},
    "threads": 1,
    "machine": {"cpu": "abacus", "cores": 2},
    "versions": {"torch": "9"},
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2031-02-03",
}


def row(value, *, claim="rises", p_value=0.5, error=0.1, **others):
    measurement = {"method": "TEMPO", "metric": "height", "unit": "m", "repeats": 8, "baseline": None}
    test = {"test": "sign-flip" if claim else None, "p_value": p_value if claim else None, "threshold": 0.0}
    own = {"value": value, "error": error, "claim": claim, "spread": None, **test}
    return {**RUN, **measurement, "baseline_value": None, **own, **others}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of rows that the command reads instead of the real one; `results(rows)` fills it."""
    monkeypatch.setattr(command, "_results", lambda package: tmp_path)

    def fill(rows, name="rl_tempo"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        return tmp_path

    return fill


def test_the_list_has_every_method_with_its_paper(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for method in methods().values():
        assert f"\n  {method.name}\n    {method.purpose}\n    {method.paper.title}, {method.paper.year}, arXiv" in out
    paper = methods()["tempo"].paper
    assert (paper.year, paper.arxiv) == (2025, "2509.18314")
    assert "trl" not in methods()["trl"].room
    assert methods()["grpo"].unreproduced_because.startswith("it is the baseline")


def test_a_method_without_rows_is_not_measured(results, capsys):
    results([])
    assert main(["methods", "tempo"]) == 0
    out = capsys.readouterr().out
    assert "not measured here" in out
    assert "|" not in out
    assert all(not method.rows for method in methods().values())
    assert main(["methods", "tempo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["claims"], found["run"]) == ([], [], None)


def test_claims_hold_as_the_rows_say(results, capsys):
    rows = [row(0.5, p_value=0.01), row(0.15), row(-0.5), row(0.3, p_value=0.04), row(0.0), row(7.25, claim=None)]
    rows.append(row(1.0, repeats=3))
    method = methods(results(rows))["tempo"]
    assert outcome(method) == "the paper's claims: holds 2, in the mean 1, does not hold 2, too few seeds 1"
    assert outcome(methods(results([row(7.25, claim=None)]))["tempo"]) == "measured, but no claim was tested"
    results(rows)
    assert main(["methods", "tempo"]) == 0
    out = capsys.readouterr().out
    assert "measured 2031-02-03, abacus, one thread, commit 0123456+" in out
    assert "| rises | height | -0.500 ± 0.100 m | 0 | 0.5 | does not hold | 8 |" in out
    assert "| height | 7.250 ± 0.100 m | 8 |" in out
    assert "| task | dice |" in out
    assert "stemma run tempo" in out


def test_rows_of_a_pretrained_model_have_a_part_of_their_own(results, capsys):
    folder = results([row(0.15)]) / "real"
    folder.mkdir()
    (folder / "rl_tempo.jsonl").write_text(json.dumps(row(0.7, p_value=0.01, shapes={"model": "large"})) + "\n")
    method = methods(folder.parent)["tempo"]
    assert outcome(method) == "the paper's claims: in the mean 1; on a pretrained model: holds 1"
    assert main(["methods", "tempo"]) == 0
    assert "| model | large |" in capsys.readouterr().out.partition("On a pretrained model:")[2]
    page = import_module("benchmarks.methods").page(folder.parent)
    assert "| rises | height | 0.700 ± 0.100 m | 0 | 0.01 | holds | 8 |" in page.partition("On a pretrained model:")[2]
    assert main(["methods", "tempo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["real"]
    assert (found["run"]["shapes"], found["claims"][0]["verdict"]) == ({"model": "large"}, "holds")


def test_json_holds_every_row_and_its_run_once(results, capsys):
    results([row(0.5, p_value=0.01), row(2.0, claim=None)])
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]["tempo"]
    assert [each["value"] for each in found["rows"]] == [0.5, 2.0]
    assert [each["verdict"] for each in found["claims"]] == ["holds"]
    assert found["run"] == {key: value for key, value in RUN.items() if key != "recipe"}
    assert "machine" not in found["rows"][0]
    assert found["paper"]["arxiv"] == "2509.18314"


@pytest.mark.parametrize(("asked", "near"), [("tempoo", "tempo"), ("ntk_attention", "ntk-attention"), ("grop", "grpo")])
def test_an_unknown_method_names_the_nearest(asked, near, capsys):
    assert main(["methods", asked]) == 2
    assert f"Did you mean `stemma methods {near}`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["", "Source: TEMPO (2025, arXiv 2509.18314).", 'Source: "TEMPO", 2025, arXiv 509.18314.']
)
def test_a_docstring_without_a_source_is_named(source, tmp_path):
    path = tmp_path / "method.py"
    path.write_text(f"'''What for.\n\n{source}\n'''\n")
    with pytest.raises(InvalidDataError, match=r"method\.py names no source"):
        command._read(path, "rl", tmp_path)


def test_a_source_may_run_over_lines_and_go_on(tmp_path):
    path = tmp_path / "new_method.py"
    source = 'Source: "A long\ntitle", 2026,\narXiv 2601.00001v3 (no\ncode).'
    text = f"What for.\n\n{source}\n\nNo `run`: it needs\na moon. Really.\n"
    path.write_text(f"'''{text}'''\n")
    method = command._read(path, "rl", tmp_path)
    assert (method.name, method.purpose) == ("new-method", "What for.")
    assert method.paper == command.Paper("A long title", 2026, "2601.00001")
    assert method.unreproduced_because == "it needs a moon."
    assert outcome(method) == "no reproduction: it needs a moon."
    assert not method.reproduced


def test_the_command_imports_no_torch():
    code = (
        "import sys\nfrom stemma.cli.main import main\n"
        "main(['methods'])\nmain(['methods', 'tempo'])\nmain(['methods', 'nope'])\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_page_says_what_files_and_rows_say(tmp_path):
    page = import_module("benchmarks.methods")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.page(), "run: python benchmarks/methods.py"
    assert page.page(tmp_path) != text
    (tmp_path / "rl_tempo.jsonl").write_text(json.dumps(row(0.5, p_value=0.01)) + "\n")
    text = page.page(tmp_path)
    assert "| rises | height | 0.500 ± 0.100 m | 0 | 0.01 | holds | 8 |" in text
    assert "Measured 2031-02-03, abacus, one thread, commit 0123456+; all numbers: [TEMPO," in text
    assert text.count("Not measured here.") == sum(method.reproduced for method in methods(tmp_path).values()) - 1


def test_the_page_of_reproductions_says_what_notes_and_rows_say():
    page = import_module("benchmarks.recipes")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.page(), "run: python benchmarks/recipes.py"
    assert "not measured" not in text  # of a number in the notes


def test_rows_are_those_of_the_checkout_or_of_the_wheel(tmp_path):
    package = tmp_path / "src" / "stemma"
    package.mkdir(parents=True)
    with pytest.raises(InvalidDataError, match="install Stemma again"):
        command._results(package)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert command._results(package) == tmp_path / "benchmarks" / "results"
    (package / "_results").mkdir()
    assert command._results(package) == package / "_results"


def test_a_wheel_holds_the_rows(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"benchmarks/results": "stemma/_results"}
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
            assert archive.read(f"stemma/_results/{path.name}") == path.read_bytes()
        for path in (ROOT / "src" / "stemma" / "recipes").glob("*.md"):
            assert archive.read(f"stemma/recipes/{path.name}") == path.read_bytes()


@pytest.mark.parametrize(
    "line", ["", '{"recipe": ', "[]", "null", "{}", json.dumps(row(0.5, recipe="pppo"))], ids=range(6)
)
def test_a_line_that_is_no_row_of_the_method_is_named(results, capsys, line):
    file = results([row(0.5)]) / "rl_tempo.jsonl"
    file.write_text(file.read_text() + line + "\n")
    assert main(["methods"]) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "rl_tempo.jsonl, line 2: no measurement of tempo" in shown
