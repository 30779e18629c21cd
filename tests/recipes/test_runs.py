"""Reproductions: finished runs are kept, the report says what the runs did."""

import json
import math
import re
from pathlib import Path

import pytest

import stemma.recipes
from stemma.errors import InvalidDataError
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs, fingerprint, kept_folder
from stemma.recipes._tables import notes, tables

RECIPES = Path(stemma.recipes.__file__).parent


def test_a_finished_run_is_not_made_again(tmp_path):
    lines, calls = [], []
    runs = Runs(tmp_path, say=lines.append)

    def train():
        calls.append(1)
        return {"final": 0.5}

    first = runs("mine, 35 % of it/whole", 3, {"lr": 1e-4}, train)
    again = runs("mine, 35 % of it/whole", 3, {"lr": 1e-4}, train)
    assert first == again
    assert first["method"] == "mine, 35 % of it/whole"
    assert [path.name for path in tmp_path.iterdir()] == [f"mine-35-of-it-whole-3-{fingerprint({'lr': 1e-4})}.json"]
    assert (first["seed"], first["settings"]) == (3, {"lr": 1e-4})
    assert len(calls) == 1
    assert "finished before" in lines[-1]
    runs("mine", 3, {"lr": 2e-4}, train)  # other settings are another run
    runs("mine", 4, {"lr": 1e-4}, train)
    assert len(calls) == 3
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_leaves_nothing_and_the_others_stay(tmp_path):
    runs = Runs(tmp_path, say=lambda line: None)
    runs("a", 0, {}, lambda: {"final": 1})

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs("a", 1, {}, interrupted)
    assert len(list(tmp_path.iterdir())) == 1
    assert runs("a", 1, {}, lambda: {"final": 2})["final"] == 2


def test_a_damaged_run_is_named(tmp_path):
    runs = Runs(tmp_path, say=lambda line: None)
    runs("a", 0, {}, lambda: {})
    (path,) = tmp_path.iterdir()
    path.write_text('{"final": ')
    with pytest.raises(InvalidDataError, match="remove it"):
        runs("a", 0, {}, lambda: {})


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"method": "b", "seed": 0}'])
def test_a_file_that_no_finished_run_leaves_is_named(tmp_path, content):
    runs = Runs(tmp_path, say=lambda line: None)
    runs("a", 0, {}, lambda: {})
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    with pytest.raises(InvalidDataError, match="not what a finished run leaves"):
        runs("a", 0, {}, lambda: {})


def test_a_place_for_runs_that_cannot_be_made_is_known_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Runs(tmp_path / "file" / "runs")


def test_a_quick_check_has_a_folder_of_its_own(tmp_path):
    assert Options(output_dir=tmp_path).folder == tmp_path
    assert Options(output_dir=tmp_path, quick=True).folder == tmp_path / "quick"


def test_fingerprints_depend_on_values_and_not_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_seeds_must_be_positive():
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        Options(seeds=0)


def finished(method, seed, final):
    curve = [
        {"sampled": 0.0, "optimised": 0.0, "pass@1": 0.1},
        {"sampled": 100.0, "optimised": 50.0, "pass@1": final},
    ]
    per_step = {"tokens/forwarded": 60.0, "tokens/without_sharing": 100.0, "compare/gradient_error": 1e-7 * (seed + 1)}
    return {"method": method, "seed": seed, "curve": curve, "final": {"pass@1": final}, "per_step": per_step}


def test_the_report_says_what_the_runs_did(tmp_path):
    report = Report("demo", "Demo", {"task": "none"}, budget=100)
    for seed, better in enumerate([0.5, 0.5, 0.5]):
        report.add(finished("better", seed, better))
    for seed, base in [(2, 0.5), (0, 0.3), (1, 0.4)]:  # in another order: pairs are of one seed
        report.add(finished("base", seed, base))
    report.compare("better", "base", "pass@1", "is better")
    report.compare("base", "better", "area", "is worse")
    report.record("better", "something else", 7.0, repeats=2)
    sure = {"claim": "is sure", "threshold": 0.5, "test": "binomial", "p_value": 1e-9}
    report.record("better", "many", 12345.6, error=23.4, **sure)
    report.claim("better", "times faster", [2.0, 3.0, 2.5, 2.2, 2.3], "is fast", threshold=1.0)
    report.claim("better", "error left", [1.0, math.inf], "diverges nowhere")
    report.record("better", "bytes", 4096.0, claim="is small", test="count")
    result = report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.md", "demo.png"]
    stored = json.loads((tmp_path / "demo.json").read_text())
    assert stored == json.loads(json.dumps(result))
    rows = {(row["method"], row["metric"]): row for row in stored["measurements"]}
    assert rows["base", "pass@1"]["value"] == pytest.approx(0.4)
    assert rows["better", "area"]["value"] == pytest.approx(0.3)
    assert rows["base", "encoded_without_sharing"]["value"] == 100
    assert rows["base", "gradient_error"]["value"] == pytest.approx(3e-7)  # the largest, not the mean
    claimed = rows["better", "pass@1, better − base"]
    assert claimed["value"] == pytest.approx(0.1)
    assert claimed["p_value"] == 0.25  # the third pair is equal, so its sign does not matter
    assert claimed["values"] == pytest.approx([0.2, 0.1, 0.0])
    assert rows["better", "error left"]["values"] == [1.0, None]
    text = (tmp_path / "demo.md").read_text()
    assert "| is better | pass@1, better − base | +0.100 ± 0.058 | 0 | 0.25 | too few seeds | 3 |" in text
    assert "| is worse | area under the curve, base − better | -0.050 ± 0.029 | 0 | 1 | too few seeds | 3 |" in text
    assert "| is fast | times faster | 2.400 ± 0.170 | 1 | 0.031 | holds | 5 |" in text
    assert "| diverges nowhere | error left | – | 0 | – | – | 2 |" in text
    assert "| is small | bytes | 4,096 | 0 | a count | holds | 1 |" in text
    assert "\n\n".join(tables(stored["measurements"], stored["about"])) in text
    assert "| something else | 7.000 | 2 |" in text
    assert "| is sure | many | 12,346 ± 23 | 0.5 | < 0.001 | holds | 1 |" in text


def test_methods_and_metrics_that_never_meet_have_tables_of_their_own():
    report = Report("demo", "Demo", {})
    for method, metric in [("a", "x"), ("b", "y"), ("a", "z"), ("c", "z"), ("b", "w")]:
        report.record(method, metric, 1.0)
    found = tables([vars(measurement) for measurement in report.measurements])
    assert [table.splitlines()[0] for table in found] == ["| also measured | a | c | n |", "| also measured | b | n |"]
    assert [len(table.splitlines()) for table in found] == [4, 4]
    report.record("c", "y", 1.0)
    (table,) = tables([vars(measurement) for measurement in report.measurements])
    assert table.splitlines()[0] == "| also measured | a | c | b | n |"


def test_notes_take_their_numbers_from_rows_and_hold_no_verdict():
    row = {
        "method": "start",
        "metric": "share of outputs with wrong text",
        "value": 0.125,
        "error": None,
        "unit": "",
        "baseline": None,
    }
    first = notes("tempo", [row])[0]
    assert "0.125 of its outputs, the noisier one in not measured" in first
    assert notes("no_such_recipe", []) == []
    for path in sorted(RECIPES.glob("*.md")):
        assert not re.search(r"±|\bp [=<]|\b(holds|in the mean|does not hold|reproduces?)\b", path.read_text()), path


def test_every_recipe_has_notes():
    assert {path.stem for path in RECIPES.glob("[!_]*.md")} == {path.stem for path in RECIPES.glob("[!_]*.py")}


def test_a_kept_folder_is_made_once_and_whole_or_not_at_all(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "weights").write_text("1")

    target = tmp_path / "new" / "kept"
    assert kept_folder(target, make) == kept_folder(target, make) == target
    assert (target / "weights").read_text() == "1"
    assert len(made) == 1
    assert made[0] != target
    assert list(target.parent.iterdir()) == [target]

    def fails(folder):
        make(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        kept_folder(tmp_path / "new" / "other", fails)
    assert list(target.parent.iterdir()) == [target]


def test_a_kept_folder_of_a_faster_process_stays(tmp_path):
    target = tmp_path / "kept"

    def slower(folder):
        for each, text in ((folder, "slower"), (target, "faster")):
            each.mkdir()
            (each / "weights").write_text(text)

    assert kept_folder(target, slower) == target
    assert (target / "weights").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [target]
