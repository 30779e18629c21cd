"""A method is plugged in by its place: one file in `stemma.rl`, nothing else touched."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import stemma.rl
from stemma.cli.main import main
from stemma.data import diallock
from stemma.train.tracking import read_rows

METHOD = '''
"""Half credit: advantages of a chosen size, and no gradient for the first tokens.

Source: "Nothing of the kind", 2026, arXiv 2601.00001.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Run
from stemma.rl.engine.options import check_fields


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of half credit."""

    defaults: ClassVar[dict[str, Any]] = {"scale_rewards": "none", "entropy_coef": 0.01}

    factor: float = 0.5
    """What advantages are multiplied by."""
    skipped: int = 0
    """Tokens at the beginning of a completion that are not trained on."""

    def __post_init__(self) -> None:
        check_fields(self)


class Scaled:
    def __init__(self, credit: Any, factor: float) -> None:
        self.credit, self.factor = credit, factor

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        return self.credit(batch) * self.factor

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        return {"half/factor": self.factor}


def hooks(config: Config, run: Run) -> dict[str, Any]:
    """The credit, and where tokens are skipped the rollout, which remembers them in an extra, and the mask."""
    inner = run.credit or GroupCredit(scale_rewards=run.options.scale_rewards)
    found: dict[str, Any] = {"credit": Scaled(inner, config.factor)}
    if config.skipped:
        found["rollout"] = lambda generate, rows, count, seeds, step: remember(
            generate([row["prompt_ids"] for row in rows], count, seeds), config.skipped
        )
        found["loss_mask"] = lambda batch, step: torch.arange(batch.completion_ids.shape[1]) >= batch.extras[
            "skipped"
        ][:, None]
    return found


def remember(batch: RolloutBatch, skipped: int) -> RolloutBatch:
    batch.extras["skipped"] = torch.full((len(batch),), skipped)
    return batch
'''

SMALL = [
    *("--sft-steps", "2", "--max-steps", "2", "--shots", "2", "--num-generations", "4", "--compare-every", "0"),
    *("--per-device-train-batch-size", "8", "--max-completion-length", "20", "--eval-prompts", "0"),
    *("--num-iterations", "2", "--save-steps", "1"),
]


@pytest.fixture(autouse=True)
def _a_method_is_dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`half_credit.py` in a folder that `stemma.rl` also looks into; any text earns something."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "half_credit.py").write_text(METHOD.lstrip(), encoding="utf-8")
    monkeypatch.setattr(stemma.rl, "__path__", [*stemma.rl.__path__, str(tmp_path / "plugins")])
    monkeypatch.setattr(diallock, "reward", lambda prompt, completion, slack=2: sum(completion) % 7 / 7)
    yield
    sys.modules.pop("stemma.rl.half_credit", None)


def train(folder: Path, *flags: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        main(["train", "--json", "--output-dir", str(folder), *SMALL, *flags])
    assert output.getvalue(), errors.getvalue()
    result: dict[str, Any] = json.loads(output.getvalue())
    return result


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["phase"] == "grpo"]


def test_a_dropped_file_trains_with_a_flag_of_its_own(tmp_path: Path) -> None:
    flags = ["--method", "half-credit", "--half-credit.factor", "0.25", "--half-credit.skipped", "3"]
    assert train(tmp_path / "run", *flags)["status"] == "finished"
    assert {row["half/factor"] for row in rows(tmp_path / "run") if "half/factor" in row} == {0.25}
    assert all(row["tokens/optimised"] > 0 for row in rows(tmp_path / "run"))
    sampled = rows(tmp_path / "run")[0]["tokens/sampled"]
    assert rows(tmp_path / "run")[0]["tokens/optimised"] == sampled - 3 * 8
    stored = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert stored["half_credit"] == {"factor": 0.25, "skipped": 3}
    assert (stored["scale_rewards"], stored["entropy_coef"]) == ("none", 0.01)  # the method's defaults
    again = train(tmp_path / "again", "--config", str(tmp_path / "run" / "config.resolved.yaml"))
    assert again["status"] == "finished"
    numbers = [[(row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)] for name in ("run", "again")]
    assert numbers[0] == numbers[1]


def test_its_extras_are_in_a_checkpoint_between_two_updates_of_a_batch(tmp_path: Path) -> None:
    flags = ["--method", "half-credit", "--half-credit.skipped", "3"]
    train(tmp_path / "run", *flags, "--save-total-limit", "9")
    for path in sorted((tmp_path / "run" / "checkpoint-000004").rglob("*"), reverse=True):
        path.unlink()
    (tmp_path / "run" / "checkpoint-000004").rmdir()
    whole = rows(tmp_path / "run")
    assert train_again(tmp_path / "run")["status"] == "finished"
    assert [row["grad_norm"] for row in rows(tmp_path / "run")] == [row["grad_norm"] for row in whole]


def train_again(folder: Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()):
        main(["train", "--json", "--output-dir", str(folder), "--resume"])
    result: dict[str, Any] = json.loads(output.getvalue())
    return result


def test_it_may_be_the_credit_and_builds_on_another_one(tmp_path: Path) -> None:
    for name, flags in (
        ("credit", ["--credit", "half-credit", "--half-credit.factor", "0.25"]),
        ("built", ["--method", "half-credit", "--credit", "tempo"]),
    ):
        assert train(tmp_path / name, *flags)["status"] == "finished"
        assert "half/factor" in rows(tmp_path / name)[0]
    more = train(tmp_path / "more", "--credit", "half-credit", "--half-credit.skipped", "1")
    assert "is more than a credit, it gives credit, loss_mask, rollout" in more["message"]


def test_the_help_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert "half-credit" in page
    assert "--half-credit.factor" not in page
    assert main(["train", "--help", "--method", "half-credit"]) == 0
    page = capsys.readouterr().out
    assert "--half-credit.factor FLOAT" in page
    assert "Options of half credit." in page
    assert "What advantages are multiplied by." in " ".join(page.split())
