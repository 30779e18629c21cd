"""`stemma run kvcomm --quick`: runs, compares every way on the same prompts, and does not repeat what is finished."""

import json

from stemma.recipes import kvcomm
from stemma.recipes._runs import Options
from stemma.recipes.kvcomm import OURS, WAYS


def test_the_reproduction_runs_and_finished_runs_are_read(tmp_path, monkeypatch):
    options = Options(quick=True, output_dir=tmp_path / "report", cache_dir=tmp_path / "cache")
    result = kvcomm.run(options)
    stored = json.loads((tmp_path / "report" / "quick" / "kvcomm.json").read_text(encoding="utf-8"))
    assert stored["measurements"] == result["measurements"]
    assert len([row for row in result["measurements"] if row["claim"]]) == 7
    found = {(row["method"], row["metric"]): row["value"] for row in result["measurements"]}
    assert {method for method, metric in found if metric.startswith("divergence from dense")} == set(WAYS)
    assert found[OURS, "prefills compared"] == 9  # three problems fill the pool, three are reused by three agents
    assert found[OURS, "share of prefills reused"] == 0.5
    assert 0 < found[OURS, "tokens run through the model, of those of dense prefills"] < 1

    def again(*arguments):
        raise AssertionError(f"measured again: {arguments}")

    for name in ("_stream", "_first_token"):
        monkeypatch.setattr(kvcomm, name, again)
    assert kvcomm.run(options)["measurements"] == result["measurements"]
