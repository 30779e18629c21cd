"""`stemma run hydragen --quick`: runs, compares equal tokens, reports, and does not repeat what is finished."""

import json

from stemma.recipes import hydragen
from stemma.recipes._runs import Options


def test_the_reproduction_runs_and_finished_runs_are_read(tmp_path, monkeypatch):
    options = Options(quick=True, output_dir=tmp_path)
    result = hydragen.run(options)
    stored = json.loads((tmp_path / "quick" / "hydragen.json").read_text(encoding="utf-8"))
    assert stored["measurements"] == result["measurements"]
    claims = [row["claim"] for row in result["measurements"] if row["claim"]]
    assert len(claims) == 3
    found = {(row["method"], row["metric"]): row["value"] for row in result["measurements"]}
    shared, dense = (found[method, "cache, prefix 128"] for method in (hydragen.SHARED, hydragen.DENSE))
    assert shared < dense / 7  # eight rows, one prefix

    def again(*arguments):
        raise AssertionError(f"measured again: {arguments}")

    monkeypatch.setattr(hydragen, "_measure", again)
    assert hydragen.run(options)["measurements"] == result["measurements"]
