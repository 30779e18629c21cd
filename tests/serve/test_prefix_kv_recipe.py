"""`stemma run prefix-kv --quick`: runs, compares at equal bytes, reports, and does not repeat what is finished."""

import json

from stemma.serve import _recipe_prefix_kv
from stemma.serve.prefix_kv import run
from stemma.train.recipe import Options


def test_the_reproduction_runs_and_finished_runs_are_read(tmp_path, monkeypatch):
    options = Options(quick=True, output_dir=tmp_path, cache_dir=tmp_path / "cache")
    result = run(options)
    stored = json.loads((tmp_path / "prefix-kv.json").read_text(encoding="utf-8"))
    assert stored["measurements"] == result["measurements"]
    claims = [row for row in result["measurements"] if row["claim"]]
    assert len(claims) == len(_recipe_prefix_kv.METHODS)  # each baseline, and speed
    found = {(row["method"], row["metric"]): row["value"] for row in result["measurements"]}
    for method in _recipe_prefix_kv.METHODS:
        if method != _recipe_prefix_kv.PROFILE:
            assert abs(found[method, "loss added, 10⁻³ nats, kept 100%"]) < 1e-3
    assert found["random", "divergence, 10⁻³ nats, kept 5%"] > 0

    def again(*arguments):
        raise AssertionError(f"measured again: {arguments}")

    for work in ("_planted", "_quality", "_speed"):
        monkeypatch.setattr(_recipe_prefix_kv, work, again)
    assert run(options)["measurements"] == result["measurements"]


def test_in_planted_layers_the_waterline_retains_most_and_errs_least():
    runs = [_recipe_prefix_kv._planted(seed, tokens=256)["found"] for seed in range(3)]
    for keep in ("0.5", "0.2", "0.1"):
        error, retained = ({m: sum(run[m][keep][n] for run in runs) / 3 for m in runs[0]} for n in (0, 1))
        assert all(retained["PrefixKV"] > retained[m] for m in retained if m != "PrefixKV")
        assert error["PrefixKV"] < 0.9 * error["uniform"]
        assert error["PrefixKV"] < error["pyramid, layers in any order"]
