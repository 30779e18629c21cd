"""`stemma run prefix-kv --quick`: runs, compares at equal bytes, reports, and does not repeat what is finished."""

import json

import pytest

from stemma.recipes import prefix_kv
from stemma.recipes._runs import Options


def test_the_reproduction_runs_and_finished_runs_are_read(tmp_path, monkeypatch):
    options = Options(quick=True, output_dir=tmp_path, cache_dir=tmp_path / "cache")
    result = prefix_kv.run(options)
    stored = json.loads((tmp_path / "quick" / "prefix-kv.json").read_text(encoding="utf-8"))
    assert stored["measurements"] == result["measurements"]
    claims = [row["claim"] for row in result["measurements"] if row["claim"]]
    assert len(claims) == 12
    found = {(row["method"], row["metric"]): row["value"] for row in result["measurements"]}
    for method in prefix_kv.METHODS:
        assert found[method, "divergence, 10⁻³ nats, kept 5%"] > 0
    sizes = [found[f"kept {share}", "keys and values, 2 rows of 384 bytes"] for share in ("100%", "50%", "10%")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.02)
    assert sizes[2] / sizes[0] == pytest.approx(0.1, abs=0.02)

    def again(*arguments):
        raise AssertionError(f"measured again: {arguments}")

    for work in ("_planted", "_quality", "_speed"):
        monkeypatch.setattr(prefix_kv, work, again)
    assert prefix_kv.run(options)["measurements"] == result["measurements"]


def test_in_planted_layers_the_waterline_retains_most_and_errs_least():
    runs = [prefix_kv._planted(seed, tokens=256)["found"] for seed in range(3)]
    for keep in ("0.5", "0.2", "0.1"):
        error, retained = ({m: sum(run[m][keep][n] for run in runs) / 3 for m in runs[0]} for n in (0, 1))
        assert all(retained["waterline"] > retained[m] for m in retained if m != "waterline")
        assert error["waterline"] < 0.9 * error["equal sizes"]
        assert error["waterline"] < error["pyramid, layers in any order"]
