"""The reproduction of NTK-Attention: error and cost against the length of a prefix, and fine-tuning beside peft.

Adapters turn the base model, which has read the library's sources, to the prose of the language reference. A method's
learning rate is the best of all on validation text with the first seed; all seeds then train with it. With `--model` a
pretrained model is adapted, once by each method, and each passage of test text is a seed.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stemma.attention.kernelized import FeatureMap, kernel_attention, kernel_sums, reference_attention_with_partial
from stemma.data.python_text import reference_texts
from stemma.errors import MissingExtraError, NonFiniteError
from stemma.recipes._base_model import BaseModel, GivenModel, python_base, text_rows
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs, fingerprint
from stemma.recipes._statistics import mean_and_error
from stemma.train import sft
from stemma.train.fit import run_steps
from stemma.train.seeds import stream, stream_seed
from stemma.tune.ntk_attention import Config, attach, parameter_count

__all__ = ["MAPS", "METHODS", "Setting", "approximation_error", "run"]

MAPS: dict[str, FeatureMap | None] = {
    "no prefix": None,
    "elu, as published": FeatureMap(normalize=False),
    "elu, normalised": FeatureMap(),
    "Taylor-1": FeatureMap(name="taylor", degree=1),
    "Taylor-2": FeatureMap(name="taylor", degree=2),
    "1024 random features": FeatureMap(name="random", num_features=1024),
}
NTK, LIGHT = "NTK-Attention", "NTK-Attention, light start"
"""An untrained prefix that weighs as much as 32 keys, as the published map makes it with heads of 32, or as one."""
METHODS = (NTK, LIGHT, "prefix tuning", "P-tuning v2", "LoRA")
SHARED = "NTK-Attention per key head"
GIVEN_RATES = {NTK: (0.03, 0.1), SHARED: (0.03, 0.1), "prefix tuning": (3e-3, 1e-2), "LoRA": (1e-3, 3e-3)}
"""Methods on a given model, and the learning rates to choose from."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of the reproduction."""

    lengths: tuple[int, ...] = (16, 128, 1024, 8192)
    """Keys of the prefix."""
    repeats: int = 9
    """Timings of each length."""
    steps: int = 150
    """Steps of every fine-tuning."""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    """Learning rates to choose from."""
    evaluated: int = 64
    """Rows of validation and of test text."""
    evaluations: int = 6
    """Evaluations on validation text while training."""
    batch: tuple[int, int] = (8, 128)
    """Rows of a step and their tokens."""


def run(options: Options) -> dict[str, Any]:
    """Run, or read what was run before, and write the report."""
    setting = Setting()
    if options.quick:
        setting = Setting(lengths=(16, 64), repeats=3, steps=2, rates=(1e-3, 1e-2), evaluated=2)
    if options.model is not None:
        return _adapt_given(options)
    seeds = options.seeds or (1 if options.quick else 5)
    runs = Runs(options.folder / "runs" / "ntk-attention")
    _require_peft()
    base = python_base(options)
    text = fingerprint({split: reference_texts(split) for split in ("train", "validation", "test")})
    about = {
        "error and cost": "one head of size 32, 64 queries; entries of variance 0.09",
        "base model": f"byte-level Llama of {base.parameters:,} parameters, trained on sources of the library",
        "adapted to": f"prose of the language reference, {setting.steps} steps of 8 × 128 bytes",
        "learning rates": f"the best on validation text of {', '.join(f'{rate:g}' for rate in setting.rates)}",
        "seeds": seeds,
    }
    report = _Report("ntk-attention", "NTK-Attention: a prefix of any length as two sums per head", about, setting)
    report.errors(seeds)
    sizes = {"lengths": setting.lengths, "repeats": setting.repeats, "kept": "each time"}
    report.costs(runs("cost of a prefix", 0, sizes, lambda: {"costs": _costs(setting)})["costs"])
    for method in METHODS:

        def tuned(rate: float, seed: int, method: str = method) -> dict[str, Any]:
            told = {"steps": setting.steps, "evaluated": setting.evaluated, "base": base.folder.name, "rate": rate}
            told["text"] = text
            return runs(method, seed, told, partial(_tune, setting, base, method, rate, seed))

        rate = min(setting.rates, key=lambda rate: tuned(rate, 0)["curve"][-1][1])
        report.found[method] = [tuned(rate, seed) for seed in range(seeds)]
    report.tuned(_bits(base.model, _rows(base, "test", setting)))
    return report.write(options.folder)


def _adapt_given(options: Options) -> dict[str, Any]:
    """The comparison of adapters on a given model."""
    assert options.model is not None
    _require_peft()
    base = GivenModel.load(options.model)
    steps, evaluated = (2, 2) if options.quick else (24, 16)
    setting = Setting(lengths=(), steps=steps, evaluated=evaluated, evaluations=2, batch=(2, 64))
    about = {
        "base model": base.about,
        "adapted to": f"prose of the language reference, {steps} steps of 2 × 64 tokens",
        "learning rates": "the better of two on validation text",
        "n": f"passages of 128 tokens that one run of each method is tested on: {evaluated}",
    }
    report = _Report("ntk-attention", "NTK-Attention: a prefix of any length as two sums per head", about, setting)
    report.unit = "token"
    runs = Runs(options.folder / "runs" / "ntk-attention")
    for method, rates in GIVEN_RATES.items():
        told = {"setting": asdict(setting), "base": base.folder.name}
        tuned = [
            runs(method, 0, told | {"rate": rate}, partial(_tune, setting, base, method, rate, 0)) for rate in rates
        ]
        report.found[method] = [min(tuned, key=lambda run: run["curve"][-1][1])]
    report.tuned(_bits(base.model, _rows(base, "test", setting)))
    return report.write(options.folder)


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
        return reference_attention_with_partial(query, key, value, answer, log_sum, scale=scale, causal=True)

    exact = attention(scores.softmax(-1) @ above_value, scores.logsumexp(-1))
    if map_ is None:
        return (attention(torch.zeros_like(query), nothing) - exact).abs().max().item()
    projection = map_.projection(32, seed)
    sums = kernel_sums(map_(above_key, scale, projection), above_value, positive=map_.positive)
    found = attention(*kernel_attention(map_(query, scale, projection), sums, positive=map_.positive))
    return (found - exact).abs().max().item()


def _costs(setting: Setting) -> dict[str, Any]:
    """CPU time, floating-point operations and bytes of one head's attention for 64 queries of size 32."""
    query = torch.randn(64, 32)

    def timed(function: Callable[[], Any]) -> dict[str, Any]:
        function()
        times = []
        for _ in range(setting.repeats):
            began = time.thread_time()
            for _ in range(20):
                function()
            times.append((time.thread_time() - began) / 20 * 1e6)
        return {"value": statistics.median(times), "unit": "us", "repeats": setting.repeats, "times": times}

    found: dict[str, Any] = {}
    for length in setting.lengths:
        key, value = torch.randn(length, 32), torch.randn(length, 32)

        def prefix(key: Tensor = key, value: Tensor = value) -> Tensor:
            scores = query @ key.T * 32**-0.5
            return torch.softmax(scores, -1) @ value + scores.logsumexp(-1, keepdim=True)

        sums = kernel_sums(FeatureMap()(key, 32**-0.5), value, positive=True)

        def standing(sums: Any = sums) -> Any:
            return kernel_attention(FeatureMap()(query, 32**-0.5), sums, positive=True)

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
    return found


# ---------------------------------------------------------------------- fine-tuning


def _rows(base: BaseModel | GivenModel, split: Any, setting: Setting) -> Tensor:
    """Rows of text to evaluate on, `(rows, 128)`."""
    if isinstance(base, GivenModel):
        return base.rows(split, setting.evaluated if split == "test" else setting.evaluated // 4 or 1, 128)
    return text_rows(reference_texts(split), setting.evaluated, 128)


def _adapted(base: BaseModel | GivenModel, method: str, seed: int) -> tuple[Any, int]:
    """A copy of the base model with an adapter, and the parameters trained (about as many, but for a projection)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "adapter"))
        return _adapt(copy.deepcopy(base.model), method, seed)


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "The comparison with prefix tuning and LoRA") from error
    return peft


def _adapt(model: Any, method: str, seed: int) -> tuple[Any, int]:
    peft = _require_peft()
    if method in (NTK, LIGHT, SHARED):
        config = Config(seed=seed, initial_mass=1.0 if method == LIGHT else None)
        attach(model, replace(config, per="key_head") if method == SHARED else config)
        return model, parameter_count(model)
    shape = model.config
    layers, width, key_width = shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    budget = layers * shape.num_attention_heads * (shape.head_dim**2 + shape.head_dim)
    if method == "LoRA":
        rank = max(1, round(budget / (layers * (3 * width + key_width))))
        options: Any = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]
        )
    else:
        options = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=max(1, round(budget / (2 * layers * key_width))),
            prefix_projection=method == "prefix tuning",
            encoder_hidden_size=width,
        )
    model = peft.get_peft_model(model, options)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tune(setting: Setting, base: BaseModel | GivenModel, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train an adapter; bits per byte of validation text on the way, and of test text in the end, infinite from where
    training diverged."""
    prose, (rows, length) = "\n".join(reference_texts("train").values()), setting.batch
    text = torch.tensor(base.tokenizer.encode(prose) if isinstance(base, GivenModel) else list(prose.encode()))

    def batches(step: int) -> dict[str, Tensor]:
        begins = torch.randint(0, len(text) - length, (rows,), generator=stream(seed, "text", step))
        ids = text[begins[:, None] + torch.arange(length)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    model, count = _adapted(base, method, seed)
    config = sft.Config(
        max_steps=setting.steps, learning_rate=rate, warmup_steps=min(10, setting.steps), weight_decay=0
    )
    trainer, validation = sft.Trainer(model, config, batches=batches), _rows(base, "validation", setting)
    every = max(1, setting.steps // setting.evaluations)
    curve = [[step, math.inf] for step in range(every, setting.steps + 1, every)]
    found: dict[str, Any] = {"rate": rate, "curve": curve, "bits_per_byte": math.inf, "parameters": count}

    def evaluate() -> dict[str, float]:
        bits, step = _bits(model, validation), trainer.completed_steps
        if step and step % every == 0:
            curve[step // every - 1][1] = bits
        return {"bits": bits}

    try:
        run_steps(trainer, evaluate=evaluate, eval_steps=every)
    except NonFiniteError:  # of too high a rate
        return found
    if isinstance(base, GivenModel):
        found["of_rows"] = [_bits(model, row[None]) for row in _rows(base, "test", setting)]
    return found | {"bits_per_byte": _bits(model, _rows(base, "test", setting))}


@torch.no_grad()
def _bits(model: Any, ids: Tensor) -> float:
    """Bits per byte, of a given model per token; infinite where training went astray."""
    model.eval()
    bits = float(model(input_ids=ids, labels=ids).loss) / math.log(2)
    return bits if math.isfinite(bits) else math.inf


# ---------------------------------------------------------------------- report


class _Report(Report):
    """The report of error, cost and fine-tuning."""

    caption = "error, cost and fine-tuning"
    size = (13, 4.6)

    def __init__(self, name: str, title: str, about: Mapping[str, Any], setting: Setting) -> None:
        super().__init__(name, title, about)
        self.setting, self.unit = setting, "byte"
        self.curves: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}
        self.found: dict[str, list[dict[str, Any]]] = {}

    def errors(self, seeds: int) -> None:
        """The error of each map against the length of the prefix."""
        lengths = self.setting.lengths
        for name, map_ in MAPS.items():
            each = [[approximation_error(map_, length, seed) for seed in range(seeds)] for length in lengths]
            self.curves[name] = [mean_and_error(values)[0] for values in each]
            for length, values in zip(lengths, each, strict=True):
                words = f"largest error of attention, prefix of {length}"
                self.mean(name, words, [1e3 * value for value in values], unit="×10⁻³")
            if name.startswith("elu"):
                gains = [math.log10(first / last) for first, last in zip(each[0], each[-1], strict=True)]
                words = f"{name}: log10 of the error at {lengths[0]} over that at {lengths[-1]}"
                self.claim(name, words, gains, "the error falls with the length of the prefix")

    def costs(self, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Time, operations and bytes of one head's attention."""
        for name, metrics in found.items():
            for metric, value in metrics.items():
                self.record(name, metric, **{key: one for key, one in value.items() if key != "times"})
            self.times[name] = [value["value"] for metric, value in metrics.items() if metric.startswith("CPU time")]
        short, long = self.setting.lengths[0], self.setting.lengths[-1]
        self.record(
            "stand-in",
            f"CPU time of an answer, {long} keys, over that of their stand-in",
            self.times["prefix"][-1] / self.times["stand-in"][-1],
        )
        near, far = (found["stand-in"][f"CPU time of an answer, {length} keys"]["times"] for length in (short, long))
        words = f"CPU time of an answer, {short} keys, over that for {long}"
        kept = [a / b for a, b in zip(near, far, strict=True)]
        self.claim("stand-in", words, kept, "cost does not depend on the length of the prefix", threshold=0.8)
        held = [found[name][f"stored, {long} keys"]["value"] for name in ("prefix", "stand-in")]
        words, claim = (
            f"bytes of {long} keys and values over those of their stand-in",
            "a long prefix takes less memory",
        )
        self.record("stand-in", words, held[0] / held[1], claim=claim, threshold=1.0, test="count")

    def tuned(self, before: float) -> None:
        """Bits per byte after fine-tuning, and the paper's comparisons."""
        self.record("no adapter", f"bits per {self.unit}, test", before)
        for method, runs in self.found.items():
            self.mean(method, f"bits per {self.unit}, test", [run["bits_per_byte"] for run in runs])
            self.record(method, "parameters trained", runs[0]["parameters"])
            self.record(method, "learning rate", runs[0]["rate"])
        for method in ("prefix tuning", "P-tuning v2", "LoRA"):
            if method in self.found:
                saved = [b - a for a, b in zip(self._values(NTK), self._values(method), strict=True)]
                words = f"bits per {self.unit} saved, {method} − NTK-Attention"
                self.claim(NTK, words, saved, f"superior or competitive to {method}")
        if SHARED in self.found:
            saved = [b - a for a, b in zip(self._values(SHARED), self._values(NTK), strict=True)]
            words, claim = (
                f"bits per {self.unit} saved, per query head − per key head",
                "a prefix per key head is no worse",
            )
            self.claim(SHARED, words, saved, claim, threshold=-0.02)

    def _values(self, method: str) -> list[float]:
        """Of each seed, of a given model of each passage."""
        runs = self.found[method]
        return runs[0]["of_rows"] if self.unit == "token" else [run["bits_per_byte"] for run in runs]

    def plot(self, figure: Any) -> None:
        """Error and CPU time against the length of the prefix, and bits per byte against steps."""
        *measured, tuning = figure.subplots(1, 3 if self.times else 1, squeeze=False)[0]
        for axis, lines in zip(measured, (self.curves, self.times), strict=False):
            for name, values in lines.items():
                axis.loglog(self.setting.lengths, values, marker="o", label=name)
        for method, runs in self.found.items():
            points = list(zip(*(run["curve"] for run in runs), strict=True))
            means = [mean_and_error([bits for _, bits in point])[0] for point in points]
            tuning.plot([point[0][0] for point in points], means, marker="o", label=method)
        labels = [("keys of the prefix", "largest error of attention"), ("keys of the prefix", "CPU time, µs")]
        labels = [*labels[: len(measured)], ("steps", f"bits per {self.unit}, validation text")]
        for axis, (x, y) in zip([*measured, tuning], labels, strict=True):
            axis.set(xlabel=x, ylabel=y)
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
