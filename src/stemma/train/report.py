"""The report of a training run, made from its metric rows alone: `report.json`, `report.md` and `plot.png`."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stemma.errors import MissingExtraError
from stemma.files import replacing, write_json, write_text
from stemma.train.tracking import read_rows

__all__ = ["require_matplotlib", "save_figure", "summarise", "write_report"]

Rows = Sequence[Mapping[str, Any]]


def require_matplotlib() -> None:
    """Raise before a long run, not after it, when its plot could not be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot", "the plot of a training run")


def save_figure(figure: Any, path: Path, *, dpi: int = 90) -> None:
    """Write a matplotlib figure as PNG; the file is whole or as it was, and the same figure gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def write_report(folder: str | os.PathLike[str], *, title: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the three files next to `metrics.jsonl`.

    Args:
        folder: the run's folder.
        title: heading of the report.
        about: facts of the run that are not in its rows (model, task, settings), for the report's first table.

    Returns:
        What `report.json` holds: the summary of the rows under its own keys, `about` under "about".
    """
    folder = Path(folder)
    rows = read_rows(folder / "metrics.jsonl")
    report = {"title": title, "about": dict(about), **summarise(rows)}
    write_json(folder / "report.json", _finite(report))
    _plot(rows, folder / "plot.png", title)
    write_text(folder / "report.md", _markdown(report))
    return report


def summarise(rows: Rows) -> dict[str, Any]:
    """Totals, means and medians of the rows of one run.

    Returns:
        `warmup` (None without one), `steps`, `reward` (mean of the first and of the last tenth of the steps, at least
        five), `groups_of_equal_reward` (mean of their share), `evaluation` (before and after, None when not
        measured), `tokens` (sampled, forwarded, what repeating each prefix would have forwarded, optimised), `seconds`,
        `comparison` (None without one) and `sampler_gap`.
    """
    warmup, steps, evaluated = ([row for row in rows if row["phase"] == phase] for phase in ("sft", "grpo", "eval"))
    rewards = _values(steps, "reward")
    tenth = min(len(rewards), max(5, len(rewards) // 10))
    forwarded, repeated = sum(_values(steps, "tokens/forwarded")), sum(_values(steps, "tokens/without_sharing"))
    compared = [row for row in steps if "compare/time_ratio" in row]
    gaps = _values(steps, "sampling/sampling_logp_difference/max")
    return {
        "warmup": {
            "steps": len(warmup),
            "loss_first": warmup[0]["loss"],
            "loss_last": warmup[-1]["loss"],
            "seconds": sum(_values(warmup, "time/step")),
        }
        if warmup
        else None,
        "steps": len(steps),
        "reward": {"first": _mean(rewards[:tenth]), "last": _mean(rewards[-tenth:]), "averaged_steps": tenth},
        "groups_of_equal_reward": _mean(_values(steps, "frac_reward_zero_std")),
        "evaluation": {
            "first": {key: evaluated[0][key] for key in ("eval/reward", "eval/reward_best")},
            "last": {key: evaluated[-1][key] for key in ("eval/reward", "eval/reward_best")},
        }
        if evaluated
        else None,
        "tokens": {
            "sampled": sum(_values(steps, "tokens/sampled")),
            "forwarded": forwarded,
            "forwarded_before_update": sum(_values(steps, "tokens/forwarded_before_update")),
            "without_sharing": repeated,
            "optimised": sum(_values(steps, "tokens/optimised")),
            "saved_ratio": repeated / forwarded if forwarded else math.nan,
        },
        "seconds": {
            name: sum(_values(steps, f"time/{name}")) for name in ("rollout", "reward", "score", "update", "step")
        },
        "comparison": {
            "steps": len(compared),
            "update_seconds_shared": statistics.median(_values(compared, "compare/time_shared")),
            "update_seconds_plain": statistics.median(_values(compared, "compare/time_plain")),
            "time_ratio_median": statistics.median(_values(compared, "compare/time_ratio")),
            "max_loss_difference": max(abs(row["compare/loss_shared"] - row["compare/loss_plain"]) for row in compared),
            "max_logprob_error": max(_values(compared, "compare/logprob_error")),
            "max_gradient_error": max(_values(compared, "compare/gradient_error")),
        }
        if compared
        else None,
        "sampler_gap": max(gaps) if gaps else None,
    }


def _values(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if key in row and not math.isnan(row[key])]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: Mapping[str, Any]) -> str:
    tokens, seconds, reward = report["tokens"], report["seconds"], report["reward"]
    lines = [f"# {report['title']}", "", "![plot](plot.png)", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in report["about"].items()]
    if report["warmup"]:
        warmup = report["warmup"]
        lines += [
            "",
            "## Supervised warm-up",
            "",
            f"{warmup['steps']} steps in {warmup['seconds']:.0f} s; loss {warmup['loss_first']:.3f} → "
            f"{warmup['loss_last']:.3f}.",
        ]
    lines += ["", "## Reward", "", "| | first | last |", "|---|---|---|"]
    lines += [
        f"| training, mean of {reward['averaged_steps']} of {report['steps']} steps | {reward['first']:.3f} | "
        f"{reward['last']:.3f} |"
    ]
    if report["evaluation"]:
        first, last = report["evaluation"]["first"], report["evaluation"]["last"]
        for key, name in (("eval/reward", "mean"), ("eval/reward_best", "best of a group")):
            lines += [f"| held-out prompts, {name} | {first[key]:.3f} | {last[key]:.3f} |"]
    lines += [
        "",
        "## Tokens",
        "",
        "| | tokens |",
        "|---|---|",
        f"| sampled | {tokens['sampled']:,.0f} |",
        f"| optimised (got gradient, each time counted) | {tokens['optimised']:,.0f} |",
        f"| through the model in updates | {tokens['forwarded']:,.0f} |",
        f"| the same updates, each row by itself | {tokens['without_sharing']:,.0f} |",
        "",
        f"Sharing prefixes encoded {tokens['saved_ratio']:.2f}× fewer tokens in the updates."
        if tokens["saved_ratio"] > 1
        else "The updates shared nothing: the plain forward was taken.",
    ]
    if report["comparison"]:
        comparison = report["comparison"]
        lines += [
            "",
            "## Shared against plain, on the same rows",
            "",
            "Compared are the first rows of a step, which share less than all of them.",
            "",
            "| | shared | plain |",
            "|---|---|---|",
            f"| forward and backward, median seconds | {comparison['update_seconds_shared']:.3f} | "
            f"{comparison['update_seconds_plain']:.3f} |",
            "",
            f"Median of the ratio over {comparison['steps']} steps: **{comparison['time_ratio_median']:.2f}×**. "
            f"Largest difference of a loss {comparison['max_loss_difference']:.1e}, of a token's log-probability "
            f"{comparison['max_logprob_error']:.1e}, of a gradient, relative to the largest gradient, "
            f"{comparison['max_gradient_error']:.1e}.",
        ]
    lines += ["", "## Time", "", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in seconds.items()]
    gap = report["sampler_gap"]
    if gap is not None:
        lines += ["", f"Largest gap between the sampler's and the trainer's log-probability of a token: {gap:.1e}."]
    return "\n".join(lines) + "\n"


def _plot(rows: Rows, path: Path, title: str) -> None:
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    warmup, steps, evaluated = ([row for row in rows if row["phase"] == phase] for phase in ("sft", "grpo", "eval"))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    figure.suptitle(title)
    (ax_warmup, ax_reward, ax_loss), (ax_time, ax_tokens, ax_entropy) = axes

    _panel(ax_warmup, "supervised warm-up", "loss (nats per token)")
    _line(ax_warmup, warmup, "loss", color="tab:gray")

    _panel(ax_reward, "reward", "mean reward")
    _line(ax_reward, steps, "reward", color="tab:blue", alpha=0.35, label="each step")
    smooth = [
        {"step": row["step"], "reward": _mean(_values(steps[max(0, index - 9) : index + 1], "reward"))}
        for index, row in enumerate(steps)
    ]
    _line(ax_reward, smooth, "reward", color="tab:blue", linewidth=2.5, label="mean of the last 10")
    _line(ax_reward, evaluated, "eval/reward", color="tab:orange", marker="o", label="held-out prompts")

    _panel(ax_loss, "loss of the same batches", "policy loss")
    compared = [row for row in steps if "compare/loss_plain" in row]
    _line(ax_loss, compared or steps, "compare/loss_shared" if compared else "loss", color="tab:blue", label="shared")
    _line(ax_loss, compared, "compare/loss_plain", color="black", linestyle=":", marker="x", label="plain")

    _panel(ax_time, "forward and backward of one step", "seconds")
    _line(ax_time, compared, "compare/time_plain", color="black", marker="x", label="plain")
    _line(ax_time, compared, "compare/time_shared", color="tab:blue", marker="o", label="shared")

    _panel(ax_tokens, "tokens so far", "tokens")
    for key, label, color in (
        ("tokens/without_sharing", "updates, each row by itself", "black"),
        ("tokens/forwarded", "updates, prefixes shared", "tab:blue"),
        ("tokens/sampled", "sampled", "tab:green"),
        ("tokens/optimised", "optimised", "tab:orange"),
    ):
        total, running = 0.0, []
        for row in steps:
            total += row.get(key, 0.0)
            running.append({"step": row["step"], key: total})
        _line(ax_tokens, running, key, color=color, label=label)

    _panel(ax_entropy, "policy", "entropy (nats per token)")
    _line(ax_entropy, steps, "entropy", color="tab:purple", label="entropy")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, title: str, label: str) -> None:
    axis.set(title=title, xlabel="step", ylabel=label)
    axis.grid(alpha=0.25)


def _line(axis: Any, rows: Rows, key: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row and not math.isnan(row[key])]
    if points:
        axis.plot(*zip(*points, strict=True), **style)
