"""The reproduction of NTK-Attention: its error table, and that it runs, is kept and is reported."""

import itertools
import json
from pathlib import Path

import pytest

from stemma.recipes._runs import Options
from stemma.recipes.ntk_attention import MAPS, METHODS, approximation_error, run


def test_errors_fall_with_the_length_and_with_the_degree() -> None:
    found = {name: [approximation_error(map_, m, 0) for m in (16, 1024)] for name, map_ in MAPS.items()}
    for name in ("elu, as published", "elu, normalised", "Taylor-1", "Taylor-2", "1024 random features"):
        assert found[name][1] < 0.7 * found[name][0], name
        assert found[name][1] < 0.2 * found["no prefix"][1], name
    order = ("Taylor-2", "Taylor-1", "elu, normalised", "elu, as published", "no prefix")
    for better, worse in itertools.pairwise(order):
        assert found[better][0] < found[worse][0]


def test_it_runs_and_finished_runs_are_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    options = Options(quick=True, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    result = run(options)
    assert {row["method"] for row in result["measurements"]} == {*MAPS, *METHODS, "no adapter", "prefix", "stand-in"}
    assert json.loads(Path(result["files"]["json"]).read_text())["measurements"] == result["measurements"]
    stored = [row["value"] for row in result["measurements"] if row["metric"].startswith("operations")]
    assert stored == [131072.0, 524288.0, 262144.0, 262144.0]  # of a prefix by its length, of the stand-in always
    times = [path.stat().st_mtime_ns for path in (tmp_path / "out" / "quick" / "runs" / "ntk-attention").iterdir()]
    assert run(options)["measurements"] == result["measurements"]
    assert [
        path.stat().st_mtime_ns for path in (tmp_path / "out" / "quick" / "runs" / "ntk-attention").iterdir()
    ] == times
