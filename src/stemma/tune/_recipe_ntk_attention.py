"""The reproduction of NTK-Attention: error and cost against the length of a prefix, and fine-tuning beside peft."""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stemma.attention.kernelized import FeatureMap, kernel_answer, kernel_sums, reference_answered_attention
from stemma.errors import MissingExtraError
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.train import sft
from stemma.train.checkpoint import write_json
from stemma.train.recipe import Options, Runs, mean_and_error, paired
from stemma.train.recipe_report import Measurement, tables
from stemma.train.report import require_matplotlib
from stemma.train.seeds import stream_seed
from stemma.tune.ntk_attention import Config, attach, parameter_count

__all__ = ["MAPS", "Setting", "approximation_error", "reproduce"]

MAPS: dict[str, FeatureMap | None] = {
    "no prefix": None,
    "elu, as published": FeatureMap(normalize=False),
    "elu, normalised": FeatureMap(),
    "Taylor-1": FeatureMap(name="taylor", degree=1),
    "Taylor-2": FeatureMap(name="taylor", degree=2),
    "1024 random features": FeatureMap(name="random", num_features=1024),
}
METHODS = ("NTK-Attention", "NTK-Attention, as published", "prefix tuning", "P-tuning v2", "LoRA")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of the reproduction."""

    lengths: tuple[int, ...] = (16, 128, 1024, 8192)
    """Keys of the prefix."""
    repeats: int = 9
    """Timings of each length."""
    hidden_size: int = 96
    base_steps: int = 500
    """Steps of the base model on the library's source text."""
    steps: int = 120
    """Steps of every fine-tuning on other text."""
    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    """Learning rates; of each method the best on validation text counts."""
    evaluated: int = 48
    """Rows of validation and of test text."""


def reproduce(options: Options) -> dict[str, Any]:
    """Run, or read what was run before, and write the report."""
    setting = Setting()
    if options.quick:
        setting = Setting(
            lengths=(16, 64), repeats=3, hidden_size=32, base_steps=3, steps=2, rates=(1e-3,), evaluated=2
        )
    seeds = options.seeds or (1 if options.quick else 3)
    runs, about = Runs(options.output_dir / "runs"), asdict(setting)
    measurements, errors = _errors(setting, seeds)
    costs = runs(
        "cost of a prefix", 0, {"lengths": setting.lengths, "repeats": setting.repeats}, lambda: _cost(setting)
    )
    for name, metrics in costs["costs"].items():
        measurements += [Measurement(method=name, metric=key, **value) for key, value in metrics.items()]
    longest = f"CPU time of an answer, {setting.lengths[-1]} keys"
    times = [costs["costs"][name][longest]["value"] for name in ("prefix", "stand-in")]
    measurements.append(
        Measurement(
            method="stand-in",
            metric=f"log10 of the {longest}, over that of its stand-in",
            value=math.log10(times[0] / times[1]),
            claim="cost does not depend on the length of the prefix",
            expected="higher",
        )
    )
    base = _base(setting, options.cache_dir, runs.say)
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed, method in itertools.product(range(seeds), METHODS):
        found[method].append(runs(f"ntk {method}", seed, about, partial(_tune, setting, base, method, seed)))
    measurements += _tuned(found, _bits(_model(setting, base), "test", setting))
    return _write(options.output_dir, setting, seeds, measurements, errors, costs["costs"], found)


# ---------------------------------------------------------------------- error and cost


def approximation_error(map_: FeatureMap | None, length: int, seed: int) -> float:
    """Largest error of causal attention of 64 queries (32 wide, entries of variance 0.09, float64) when the sums over a
    prefix stand for it; None: without any prefix."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "prefix", length))
    normal = [0.3 * torch.randn(n, 32, dtype=torch.float64, generator=generator) for n in (64, 64, 64, length, length)]
    query, key, value, above_key, above_value = (x[None, None] for x in normal)
    scale, nothing = 32**-0.5, query.new_full(query.shape[:3], float("-inf"))
    scores = query @ above_key.transpose(-1, -2) * scale

    def attention(answer: Tensor, log_sum: Tensor) -> Tensor:
        return reference_answered_attention(query, key, value, answer, log_sum, scale=scale, causal=True)

    exact = attention(scores.softmax(-1) @ above_value, scores.logsumexp(-1))
    if map_ is None:
        return (attention(torch.zeros_like(query), nothing) - exact).abs().max().item()
    projection = map_.projection(32, seed)
    sums = kernel_sums(map_(above_key, scale, projection), above_value, positive=map_.positive)
    found = attention(*kernel_answer(map_(query, scale, projection), sums, positive=map_.positive))
    return (found - exact).abs().max().item()


def _errors(setting: Setting, seeds: int) -> tuple[list[Measurement], dict[str, list[float]]]:
    measurements: list[Measurement] = []
    curves: dict[str, list[float]] = {}
    for name, map_ in MAPS.items():
        curves[name] = []
        for length in setting.lengths:
            mean, error = mean_and_error([approximation_error(map_, length, seed) for seed in range(seeds)])
            curves[name].append(mean)
            words = f"largest error of attention, prefix of {length}"
            measurements.append(
                Measurement(method=name, metric=words, value=1e3 * mean, error=1e3 * error, unit="×10⁻³", repeats=seeds)
            )
    claim = "the error falls with the length of the prefix"
    for name in ("elu, as published", "elu, normalised"):
        ratio = math.log10(curves[name][0] / curves[name][-1])
        words = f"log10 of the error at {setting.lengths[0]} over that at {setting.lengths[-1]}"
        measurements.append(
            Measurement(method=name, metric=f"{name}: {words}", value=ratio, claim=claim, expected="higher")
        )
    return measurements, curves


def _cost(setting: Setting) -> dict[str, Any]:
    """CPU time, floating-point operations and bytes of one head's answer to 64 queries of size 32."""
    query = torch.randn(64, 32)

    def timed(function: Callable[[], Any]) -> dict[str, Any]:
        function()
        times = []
        for _ in range(setting.repeats):
            began = time.thread_time()
            for _ in range(20):
                function()
            times.append((time.thread_time() - began) / 20 * 1e6)
        return {"value": statistics.median(times), "unit": "us", "repeats": setting.repeats}

    found: dict[str, Any] = {}
    for length in setting.lengths:
        key, value = torch.randn(length, 32), torch.randn(length, 32)

        def prefix(key: Tensor = key, value: Tensor = value) -> Tensor:
            scores = query @ key.T * 32**-0.5
            return torch.softmax(scores, -1) @ value + scores.logsumexp(-1, keepdim=True)

        sums = kernel_sums(FeatureMap()(key, 32**-0.5), value, positive=True)

        def standing(sums: Any = sums) -> Any:
            return kernel_answer(FeatureMap()(query, 32**-0.5), sums, positive=True)

        for name, function, rows, stored in (
            ("prefix", prefix, length, 2 * length * 32),
            ("stand-in", standing, 32, 32 * 32 + 32),
        ):
            found.setdefault(name, {}).update(
                {
                    f"CPU time of an answer, {length} keys": timed(function),
                    f"operations, {length} keys": {"value": float(4 * 64 * rows * 32), "unit": "FLOP"},
                    f"stored, {length} keys": {"value": float(4 * stored), "unit": "bytes"},
                }
            )
    return {"costs": found}


# ---------------------------------------------------------------------- fine-tuning


def _text(kind: str) -> bytes:
    """Text of the Python installation: source code to begin with, prose of the language reference to adapt to."""
    if kind == "source":
        folder = Path(os.__file__).parent
        return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:120])
    from pydoc_data.topics import topics

    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    cuts = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}[kind]
    return prose[int(cuts[0] * len(prose)) : int(cuts[1] * len(prose))]


def _batch(text: bytes, rows: int, seed: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(stream_seed(seed, "text", step))
    begins = torch.randint(0, len(text) - 128, (rows,), generator=generator).tolist()
    ids = torch.tensor([list(text[begin : begin + 128]) for begin in begins])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _model(setting: Setting, weights: Mapping[str, Tensor] | None = None) -> Any:
    model = tiny_model(
        "llama", vocab_size=len(byte_tokenizer()), hidden_size=setting.hidden_size, tie_word_embeddings=True
    )
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _base(setting: Setting, folder: Path, say: Callable[[str], None]) -> dict[str, Tensor]:
    """Weights of the base model, trained once."""
    path = folder / f"ntk-base-{setting.hidden_size}-{setting.base_steps}.pt"
    if not path.exists():
        model, text = _model(setting), _text("source")
        config = sft.Config(max_steps=setting.base_steps, warmup_steps=min(20, setting.base_steps))
        trainer = sft.Trainer(model, config, batches=lambda step: _batch(text, 8, 0, step))
        for step in range(1, setting.base_steps + 1):
            metrics = trainer.step()
            if step % 100 == 0:
                say(f"base model: step {step}, {metrics['loss'] / math.log(2):.3f} bits per byte")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(model.state_dict(), temporary)
        os.replace(temporary, path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def _adapted(setting: Setting, base: Mapping[str, Tensor], method: str, seed: int) -> tuple[Any, int]:
    """The base model with an adapter, and the parameters trained (about as many, but for the projection)."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "The comparison with prefix tuning and LoRA") from error
    model = _model(setting, base)
    torch.manual_seed(stream_seed(seed, "adapter"))
    if method.startswith("NTK"):
        attach(model, Config(seed=seed, normalize="published" not in method))
        return model, parameter_count(model)
    size, layers, head_dim = setting.hidden_size, 2, setting.hidden_size // 4
    budget = layers * 4 * (head_dim**2 + head_dim)
    if method == "LoRA":
        rank = max(1, round(budget / (layers * 4 * size)))
        options: Any = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]
        )
    else:
        options = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=max(1, round(budget / (2 * layers * size))),
            prefix_projection=method == "prefix tuning",
            encoder_hidden_size=size,
        )
    model = peft.get_peft_model(model, options)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tune(setting: Setting, base: Mapping[str, Tensor], method: str, seed: int) -> dict[str, Any]:
    """Train with every rate; of the one with the lowest validation loss also the test loss."""
    text, tried = _text("train"), []
    for rate in setting.rates:
        model, count = _adapted(setting, base, method, seed)
        config = sft.Config(
            max_steps=setting.steps, learning_rate=rate, warmup_steps=min(10, setting.steps), weight_decay=0
        )
        trainer = sft.Trainer(model, config, batches=lambda step: _batch(text, 8, seed, step))
        curve = []
        for step in range(1, setting.steps + 1):
            trainer.step()
            if step % max(1, setting.steps // 6) == 0:
                curve.append([step, _bits(model, "validation", setting)])
        tried.append((curve[-1][1], rate, curve, _bits(model, "test", setting)))
    _, rate, curve, test = min(tried)
    return {"bits_per_byte": test, "rate": rate, "curve": curve, "parameters": count}


@torch.no_grad()
def _bits(model: Any, kind: str, setting: Setting) -> float:
    """Bits per byte of held-out text."""
    model.eval()
    batch = _batch(_text(kind), setting.evaluated, 0, 0)
    return float(model(**batch).loss) / math.log(2)


def _tuned(found: Mapping[str, list[dict[str, Any]]], before: float) -> list[Measurement]:
    measurements = [Measurement(method="no adapter", metric="bits per byte, test", value=before)]
    for method, each in found.items():
        mean, error = mean_and_error([run["bits_per_byte"] for run in each])
        measurements += [
            Measurement(method=method, metric="bits per byte, test", value=mean, error=error, repeats=len(each)),
            Measurement(method=method, metric="parameters trained", value=each[0]["parameters"]),
            Measurement(
                method=method, metric="learning rate chosen (median)", value=statistics.median(r["rate"] for r in each)
            ),
        ]
    ours = [run["bits_per_byte"] for run in found["NTK-Attention"]]
    for method in ("prefix tuning", "P-tuning v2", "LoRA"):
        theirs = [run["bits_per_byte"] for run in found[method]]
        difference = paired(theirs, ours)
        measurements.append(
            Measurement(
                method="NTK-Attention",
                metric=f"bits per byte saved, {method} − NTK-Attention",
                value=difference.mean,
                error=difference.error,
                repeats=difference.pairs,
                baseline=method,
                baseline_value=mean_and_error(theirs)[0],
                claim=f"superior or competitive to {method}",
                expected="higher",
                p_value=difference.p_value,
            )
        )
    return measurements


# ---------------------------------------------------------------------- report


def _write(
    folder: Path,
    setting: Setting,
    seeds: int,
    measurements: list[Measurement],
    errors: Mapping[str, list[float]],
    costs: Mapping[str, Mapping[str, Mapping[str, Any]]],
    found: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    title = "NTK-Attention: a prefix of any length as two sums per head"
    about = {
        "error and cost": "one head of size 32, 64 queries; entries of variance 0.09",
        "base model": f"byte-level Llama, 2 layers of {setting.hidden_size}, {setting.base_steps} steps on "
        "the library's source text",
        "adapted to": f"prose of the language reference, {setting.steps} steps of 8 × 128 bytes",
        "learning rates": f"the best on validation text of {', '.join(f'{rate:g}' for rate in setting.rates)}",
        "seeds": seeds,
    }
    rows = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(each).items()}
        for each in measurements
    ]
    files = {kind: str(folder / f"ntk-attention.{kind}") for kind in ("json", "md", "png")}
    folder.mkdir(parents=True, exist_ok=True)
    _plot(Path(files["png"]), setting, errors, costs, found)
    result = {
        "recipe": "ntk-attention",
        "title": title,
        "about": about,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "measurements": rows,
        "curves": {method: [run["curve"] for run in each] for method, each in found.items()},
        "files": files,
    }
    write_json(Path(files["json"]), result)
    groups = [{"prefix", "stand-in"}, {*METHODS, "no adapter"}]
    parts = tables([row for row in rows if row["claim"] or row["method"] in MAPS], about)
    for group in groups:
        parts += tables([row for row in rows if row["method"] in group and not row["claim"]])
    text = "\n\n".join([f"# {title}", "![error, cost and fine-tuning](ntk-attention.png)", *parts])
    temporary = folder / ".ntk-attention.md.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, files["md"])
    return result


def _plot(
    path: Path,
    setting: Setting,
    errors: Mapping[str, list[float]],
    costs: Mapping[str, Mapping[str, Mapping[str, Any]]],
    found: Mapping[str, list[dict[str, Any]]],
) -> None:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    error, cost, tuning = figure.subplots(1, 3)
    for name, values in errors.items():
        error.loglog(setting.lengths, values, marker="o", label=name)
    error.set_ylabel("largest error of attention")
    for name, metrics in costs.items():
        times = [metrics[f"CPU time of an answer, {length} keys"]["value"] for length in setting.lengths]
        cost.loglog(setting.lengths, times, marker="o", label=name)
    cost.set_ylabel("CPU time, µs")
    for method, runs in found.items():
        points = list(zip(*(run["curve"] for run in runs), strict=True))
        means = [mean_and_error([bits for _, bits in point])[0] for point in points]
        tuning.plot([point[0][0] for point in points], means, marker="o", label=method)
    tuning.set_ylabel("bits per byte, validation text")
    for axis, label in ((error, "keys of the prefix"), (cost, "keys of the prefix"), (tuning, "steps")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=90, metadata={"Software": None})
    os.replace(temporary, path)
