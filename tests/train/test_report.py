"""The report's numbers come from the rows; its files are complete and valid."""

import json
import math
from pathlib import Path

import pytest

from stemma.errors import MissingExtraError
from stemma.train.report import require_matplotlib, summarise, write_report


def make_rows() -> list[dict]:
    rows = [{"phase": "sft", "step": s, "global_step": s, "loss": 3.0 / s, "time/step": 0.5} for s in (1, 2, 3)]
    rows.append({"phase": "eval", "step": 0, "global_step": 3, "eval/reward": 0.25, "eval/reward_best": 0.5})
    for step in range(1, 61):
        row = {
            "phase": "grpo",
            "step": step,
            "global_step": 3 + step,
            "loss": -0.1,
            "reward": step / 60 if step > 1 else math.nan,
            "frac_reward_zero_std": 1.0 if step % 2 else 0.5,
            "entropy": 1.0,
            "tokens/sampled": 10.0,
            "tokens/forwarded": 20.0,
            "tokens/without_sharing": 80.0,
            "tokens/optimised": 9.0,
            "time/step": 2.0,
            "time/update": 1.0,
            "sampling/sampling_logp_difference/max": 1e-6 * step,
        }
        if step in (10, 20, 30):
            row |= {
                "compare/loss_shared": 0.5,
                "compare/loss_plain": 0.5 + 1e-7 * step,
                "compare/gradient_error": 1e-6,
                "compare/logprob_error": 1e-7 * step,
                "compare/time_shared": 0.1,
                "compare/time_plain": 0.01 * step,
                "compare/time_ratio": 0.1 * step,
            }
        rows.append(row)
    rows.append({"phase": "eval", "step": 60, "global_step": 63, "eval/reward": 0.75, "eval/reward_best": 1.0})
    return rows


def test_the_summary_is_the_arithmetic_of_the_rows() -> None:
    summary = summarise(make_rows())
    assert summary["warmup"] == {"steps": 3, "loss_first": 3.0, "loss_last": 1.0, "seconds": 1.5}
    assert summary["reward"]["averaged_steps"] == 5
    assert summary["reward"]["first"] == pytest.approx(sum(range(2, 7)) / 5 / 60)
    assert summary["reward"]["last"] == pytest.approx(58 / 60)
    assert summary["groups_of_equal_reward"] == pytest.approx(0.75)
    assert summary["evaluation"]["last"] == {"eval/reward": 0.75, "eval/reward_best": 1.0}
    tokens = summary["tokens"]
    assert (tokens["sampled"], tokens["forwarded"], tokens["without_sharing"]) == (600, 1200, 4800)
    assert (tokens["optimised"], tokens["saved_ratio"]) == (540, 4.0)
    comparison = summary["comparison"]
    assert comparison["time_ratio_median"] == pytest.approx(2.0)
    assert comparison["update_seconds_plain"] == pytest.approx(0.2)
    assert comparison["max_loss_difference"] == pytest.approx(3e-6)
    assert comparison["max_logprob_error"] == pytest.approx(3e-6)
    assert summary["sampler_gap"] == pytest.approx(6e-5)


def test_a_run_without_warmup_comparison_or_evaluation_has_a_report_too(tmp_path: Path) -> None:
    rows = [{"phase": "grpo", "step": 1, "global_step": 1, "loss": 0.0, "reward": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(tmp_path, title="short", about={})
    assert report["warmup"] is report["comparison"] is report["evaluation"] is None
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


def test_three_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in make_rows()).replace("NaN", "null")
    )
    write_report(tmp_path, title="A run", about={"task": "DialLock"})
    text = (tmp_path / "report.md").read_text()
    for part in ("# A run", "| task | DialLock |", "4.00× fewer tokens", "**2.00×**", "| 0.250 | 0.750 |"):
        assert part in text, part
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored["about"] == {"task": "DialLock"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*tmp*"))


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"stemma-lm\[plot\]"):
        require_matplotlib()
