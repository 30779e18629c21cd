"""Reproductions: finished runs are kept, statistics are right, the report says what the runs did."""

import itertools
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.errors import InvalidDataError
from stemma.recipes._report import Report, _finite
from stemma.recipes._runs import Options, Runs, area, fingerprint, kept_folder, mean_and_error, paired, tail_probability
from stemma.recipes._tables import tables

values = st.floats(-1, 1, allow_nan=False)


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


def test_mean_and_error_by_hand():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])


@given(st.lists(st.tuples(values, values), min_size=2, max_size=6))
def test_paired_differences_against_all_signs(pairs):
    first, second = zip(*pairs, strict=True)
    difference = paired(first, second)
    gaps = [a - b for a, b in pairs]
    assert difference.mean == pytest.approx(statistics.fmean(gaps))
    assert difference.error == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)), abs=1e-12)
    higher = sum(
        sum(s * g for s, g in zip(signs, gaps, strict=True)) >= sum(gaps) - 1e-12
        for signs in itertools.product((-1, 1), repeat=len(gaps))
    )
    assert difference.p_value == higher / 2 ** len(gaps)
    assert difference.p_value >= 2 ** -len(gaps)


def test_of_many_pairs_signs_are_drawn():
    gaps = [0.3, -0.2, 0.1, 0.4, -0.1] * 4
    drawn = paired(gaps, [0.0] * 20)
    assert drawn.pairs == 20
    chances = [1.0]  # of each sum of tenths, by convolution
    for gap in gaps:
        step = round(10 * abs(gap))
        wider = [0.0] * (len(chances) + 2 * step)
        for index, chance in enumerate(chances):
            wider[index] += chance / 2
            wider[index + 2 * step] += chance / 2
        chances = wider
    lowest = (len(chances) - 1) // 2 + round(10 * sum(gaps))
    assert drawn.p_value == pytest.approx(sum(chances[lowest:]), abs=0.01)
    assert paired(gaps, [0.0] * 20) == drawn


def test_a_run_that_diverged_makes_a_difference_unknown_and_no_error():
    mean, error = mean_and_error([math.inf, 2.4, 2.4])
    assert mean == math.inf
    assert math.isnan(error)
    assert math.isnan(paired([math.inf, 2.4], [2.0, 2.0]).p_value)
    report = Report("demo", "Demo", {})
    report.record("a", "loss", mean, error=error, claim="is low", expected="higher", p_value=math.nan)
    (table,) = tables([_finite(vars(report.measurements[0]))])
    assert "| – | – | – |" in table


def test_paired_needs_pairs():
    with pytest.raises(ValueError, match="equally long"):
        paired([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.floats(0, 10), values), min_size=1, max_size=6), st.floats(0.5, 12))
def test_area_against_many_small_steps(points, end):
    points = sorted(points)
    xs = [x for x, _ in points]

    def height(x):
        if x <= xs[0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= x < x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return points[-1][1]

    count = 2000
    reference = statistics.fmean(height(end * (i + 0.5) / count) for i in range(count))
    assert area(points, end) == pytest.approx(reference, abs=0.01)


def test_area_by_hand():
    assert area([(0, 0.0), (2, 1.0), (4, 1.0)], 4) == pytest.approx(0.75)
    assert area([(0, 0.0), (2, 1.0), (4, 1.0)], 2) == pytest.approx(0.5)
    assert area([(1, 0.5)], 3) == 0.5


def test_binomial_tail_by_hand():
    assert tail_probability(2, 2, 0.5) == pytest.approx(0.25)
    assert tail_probability(0, 5, 0.1) == pytest.approx(1.0)
    assert tail_probability(30, 512, 0.01) < 1e-10
    assert [tail_probability(k, 5, p) for k, p in ((0, 0.0), (1, 0.0), (5, 1.0))] == [1.0, 0.0, 1.0]
    exact = sum(math.comb(2000, k) for k in range(1050, 2001)) / 2**2000
    assert tail_probability(1050, 2000, 0.5) == pytest.approx(exact)


def finished(method, seed, final):
    curve = [
        {"sampled": 0.0, "optimised": 0.0, "pass@1": 0.1},
        {"sampled": 100.0, "optimised": 50.0, "pass@1": final},
    ]
    per_step = {"tokens/forwarded": 60.0, "tokens/without_sharing": 100.0, "compare/gradient_error": 1e-7 * (seed + 1)}
    return {"method": method, "seed": seed, "curve": curve, "final": {"pass@1": final}, "per_step": per_step}


def test_the_report_says_what_the_runs_did(tmp_path):
    report = Report("demo", "Demo", {"task": "none"}, budget=100)
    for seed, (base, better) in enumerate([(0.3, 0.5), (0.4, 0.5), (0.5, 0.5)]):
        report.add(finished("base", seed, base))
        report.add(finished("better", seed, better))
    report.compare("better", "base", "pass@1", "is better")
    report.compare("base", "better", "area", "is worse")
    report.record("better", "something else", 7.0, repeats=2)
    report.record("better", "many", 12345.6, error=23.4, p_value=1e-9, claim="is sure", expected="higher")
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
    text = (tmp_path / "demo.md").read_text()
    assert "| is better | pass@1, better − base | +0.100 ± 0.058 | 0.25 | in the mean | 3 |" in text
    assert "| is worse |" in text
    assert "| no | 3 |" in text
    assert "\n\n".join(tables(stored["measurements"], stored["about"])) in text
    assert "| something else | 7.000 | 2 |" in text
    assert "| is sure | many | 12,346 ± 23 | < 0.001 | yes | 1 |" in text


@pytest.mark.parametrize(
    ("value", "error", "verdict"), [(0.3, 0.1, "yes"), (0.15, 0.1, "in the mean"), (0.0, 0.1, "no")]
)
def test_verdicts_are_mechanical(value, error, verdict):
    report = Report("demo", "Demo", {})
    report.record("a", "gain", value, error=error, claim="gains", expected="higher", baseline="b")
    (table,) = tables([vars(report.measurements[0])])
    assert f"| {verdict} |" in table


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
