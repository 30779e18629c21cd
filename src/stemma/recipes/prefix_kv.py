"""`stemma run prefix-kv`: PrefixKV against other ways to spend the same bytes, and what a smaller cache saves.

The paper (LLaVA-1.5, prompts with images): the lowest perplexity at every budget, and generation 1.8 times as fast with
a fifth of the cache kept. Here, first, attention alone, in layers that are made to differ in how sharp they are; then
the base model on unseen library text: it reads a prompt, drops a share of its keys and values, and is asked for the
text behind it, which no method has seen when it chooses. All methods keep equally many tokens of the prompt. With
`--model` the second part is done on a pretrained model, each passage a seed, and the rest is left out.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stemma.cache.compressed import attention_mass, priority, retained_mass
from stemma.decode.compressed_cache import CompressedCache
from stemma.recipes._base_model import BaseModel, GivenModel, python_base
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs
from stemma.recipes._statistics import mean_and_error
from stemma.scoring.enable import enable
from stemma.serve.prefix_kv import Config, Profile, calibrate, drop, votes_of
from stemma.serve.prefix_kv.budget import proportional, pyramid, total_tokens, waterline
from stemma.train.seeds import stream

__all__ = ["run"]

OURS, PROFILE, VOTES = "PrefixKV", "PrefixKV, profile", "PrefixKV, window votes"
NORMALIZED = "PrefixKV, normalized"
METHODS: dict[str, dict[str, Any]] = {
    OURS: {"allocation": "waterline", "score": "observed"},
    PROFILE: {"allocation": "waterline", "score": "observed"},
    "uniform": {"allocation": "uniform", "score": "observed"},
    "uniform, normalized": {"allocation": "uniform", "score": "normalized"},
    NORMALIZED: {"allocation": "waterline", "score": "normalized"},
    VOTES: {"allocation": "waterline", "score": "window", "window": 32},
    "SnapKV-like": {"allocation": "uniform", "score": "window", "window": 32},
    "PyramidKV-like": {"allocation": "pyramid", "score": "window", "window": 32},
    "StreamingLLM-like": {"allocation": "uniform", "score": "recent", "protect_first": 4},
    "random": {"allocation": "uniform", "score": "random"},
}
"""Settings of `Config` by name; those with a profile take the sizes of layers from other texts."""
KEPT = (0.5, 0.3, 0.2, 0.1, 0.05)
WATERLINE, EQUAL = "waterline", "equal sizes"
"""Allocations of the planted layers, besides pyramids."""
TEMPERATURES = (0.15, 3.0)
"""Of the softmax in the first and the last planted layer."""


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    quick, given = options.quick, options.model is not None
    base = GivenModel.load(options.model) if options.model else python_base(options)
    enable(base.model, self_test=False)
    seeds = options.seeds or (1 if quick else 6)
    prompt, behind, rows = (768, 32, 1) if quick else (512, 64, 1) if given else (1024, 128, 12)
    planted = f"8 of 4 heads of 32, temperatures {TEMPERATURES[0]} to {TEMPERATURES[1]}, 512 tokens"
    source = "passages of the language reference" if given else "unseen library files"
    about = {
        **({} if given else {"planted layers": planted}),
        "model": base.about,
        "text": f"per seed {rows} {source}, {prompt} {base.unit}s compressed, {behind} predicted",
        "seeds": seeds,
    }
    report = _Report("prefix-kv", "PrefixKV: each layer keeps as many keys as its attention spreads over", about)
    report.unit = base.unit
    if given:
        report.kept = KEPT[:-1]  # a twentieth of 512 tokens is less than the window that votes, which is kept
    runs = Runs(options.folder / "runs" / "prefix-kv")
    profile = _profile(base, prompt, 2 if given else rows)
    for seed in range(seeds):
        runs.say(f"PrefixKV: seed {seed} of {seeds}")
        if not given:
            report.planted.append(runs("planted", seed, {"temperatures": TEMPERATURES}, partial(_planted, seed)))
        text = base.rows("test", rows * (seed + 1), prompt + behind)[rows * seed :]
        known = {"model": base.folder.name, "prompt": prompt, "behind": behind, "rows": rows, "methods": METHODS}
        report.quality.append(runs("quality", seed, known, partial(_quality, base, text, prompt, profile)))
    length, copies, new = (384, 2, 2) if quick else (3968, 16, 12)
    for seed in range(0 if given else 1 if quick else 5):
        work = partial(_speed, base, length, copies, new, seed)
        setting = {"model": base.folder.name, "length": length, "copies": copies, "new": new}
        report.speed.append(runs("speed", seed, setting, work))
    report.summarise(length, copies)
    return report.write(options.folder)


# ---------------------------------------------------------------------- attention alone


def _planted(seed: int, layers: int = 8, heads: int = 4, tokens: int = 512, asked: int = 64) -> dict[str, Any]:
    """Worst relative error of a layer's output, and lowest retained mass, by allocation and share kept.

    Half of the variance of queries is common to all of a head, so the sharper a layer, the fewer keys get it all.
    """
    generator = stream(seed, "planted")
    scales = (32**-0.5 / np.geomspace(*TEMPERATURES, layers)).tolist()

    def normal(count: int) -> Tensor:
        return torch.randn(1, heads, count, 32, generator=generator, dtype=torch.float64)

    states = [((normal(tokens + asked) + normal(1)) * 0.5**0.5, normal(tokens), normal(tokens)) for _ in scales]
    position = torch.arange(tokens, dtype=torch.int32)[None]
    orders, curves, behind = [], [], []
    for (query, key, value), scale in zip(states, scales, strict=True):
        scores = query[:, :, tokens:] @ key.transpose(2, 3) * scale
        behind.append((scores, value, scores.softmax(-1) @ value))
        weight = torch.ones(1, tokens)
        mass = attention_mass(query[:, :, :tokens], key, position, position, weight, scale=scale)[0].numpy()
        orders.append(priority(mass, 1, 1))
        curves.append(retained_mass(mass, orders[-1]))
    found: dict[str, dict[str, list[float]]] = {}
    for keep in KEPT:
        total = total_tokens(keep, layers, tokens, 2)
        # The sharpest layer is the first here, and a pyramid spends most on the layers that it takes for diffuse.
        fitting = proportional(pyramid(layers)[::-1], tokens, total, 2)
        for name, sizes in {
            WATERLINE: waterline(curves, total, 2),
            EQUAL: proportional([1.0] * layers, tokens, total, 2),
            "pyramid, layers in its order": fitting,
            "pyramid, layers in any order": fitting[torch.randperm(layers, generator=generator).numpy()],
        }.items():
            errors = [
                _output_error(*each, order[:size]) for each, order, size in zip(behind, orders, sizes, strict=True)
            ]
            least = min(curve[size] for curve, size in zip(curves, sizes, strict=True))
            found.setdefault(name, {})[str(keep)] = [max(errors), float(least)]
    return {"found": found}


def _output_error(scores: Tensor, value: Tensor, whole: Tensor, kept: np.ndarray) -> float:
    """Of queries behind the prompt, over the norm of the whole output."""
    part = scores[..., kept].softmax(-1) @ value[:, :, kept]
    return float((part - whole).norm() / whole.norm())


# ---------------------------------------------------------------------- the base model


def _profile(base: BaseModel | GivenModel, prompt: int, samples: int) -> Profile:
    """Sizes of layers from validation text; the paper takes about ten samples."""
    return calibrate(base.model, base.rows("validation", samples, prompt).tolist(), KEPT)


@torch.no_grad()
def _quality(base: BaseModel | GivenModel, text: Tensor, prompt: int, profile: Profile) -> dict[str, Any]:
    """For each method nats per byte lost against the whole cache, divergence from it, and bytes, by share kept."""
    model = base.model
    found: dict[str, list[dict[str, float]]] = {
        name: [{"kept": keep, "bytes": 0, "lost": 0.0, "divergence": 0.0} for keep in KEPT] for name in METHODS
    }
    for row in text:
        whole = model(row[None]).logits[0, prompt:-1].log_softmax(-1)
        target, read = row[prompt + 1 :, None], {}
        for method, points in found.items():
            for point in points:
                config = Config(keep=point["kept"], **METHODS[method])
                votes = votes_of(config)
                if votes not in read:
                    read[votes] = CompressedCache.prefill(model, [row[:prompt]], votes=votes)
                cache = deepcopy(read[votes])
                drop(cache, config, profile if method == PROFILE else None)
                point["bytes"] = cache.report().kept_bytes
                part = model(row[None, prompt:], past_key_values=cache, use_cache=True).logits[0, :-1].log_softmax(-1)
                lost = (whole.gather(1, target) - part.gather(1, target)).mean()
                point["lost"] += float(lost) / len(text)
                point["divergence"] += float((whole.exp() * (whole - part)).sum(-1).mean()) / len(text)
    return {"found": found}


@torch.no_grad()
def _speed(base: BaseModel | GivenModel, length: int, copies: int, new: int, seed: int) -> dict[str, Any]:
    """CPU time of a step, and bytes held, with so many rows that go on from one prompt."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = base.model
    (row,) = base.rows("test", seed + 1, length)[seed:].tolist()
    caches: dict[str, Any] = {"default": DynamicCache(config=model.config)}
    model(torch.tensor([row]), past_key_values=caches["default"], logits_to_keep=1)
    read = CompressedCache.prefill(model, [row], room=new)
    found: dict[str, Any] = {}
    for name in ("default", "1.0", *map(str, KEPT)):
        cache = caches.pop(name, None) or deepcopy(read)
        if isinstance(cache, CompressedCache):
            drop(cache, Config(keep=float(name)))
        cache.batch_repeat_interleave(copies)
        fed, times = torch.full((copies, 1), 32), []
        for _ in range(new):
            begin = time.thread_time()
            model(fed, past_key_values=cache, use_cache=True)
            times.append(time.thread_time() - begin)
        if isinstance(cache, CompressedCache):
            held = cache.report().kept_bytes
        else:
            held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        found[name] = [float(np.median(times[1:])), held]
    torch.set_num_threads(threads)
    return {"found": found}


# ---------------------------------------------------------------------- report


class _Report(Report):
    """The report of a comparison by share kept."""

    caption = "error of planted layers, loss behind a compressed prompt, time and bytes, against the share kept"
    size = (15, 4.3)

    def __init__(self, name: str, title: str, about: dict[str, Any]) -> None:
        super().__init__(name, title, about)
        self.unit = "byte"
        self.kept: tuple[float, ...] = KEPT
        self.planted: list[dict[str, Any]] = []
        self.quality: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []

    def summarise(self, length: int, copies: int) -> None:
        """The claims, then everything else."""
        planted = {name: self._planted(name, 0.2, 0) for name in (self.planted[0]["found"] if self.planted else ())}
        words = "planted layers, a fifth kept: worst relative error"
        if planted:
            self._claim("waterline", planted, words, (WATERLINE, EQUAL), "sizes by layer lose less than equal ones")
        for metric, words in (("lost", "loss"), ("divergence", "divergence")):
            words = f"a fifth kept: {words}, 10⁻³ nats per {self.unit}"
            values = {name: self._curve(name, metric)[0.2] for name in METHODS}
            for pair in (OURS, "uniform"), (VOTES, "SnapKV-like"):
                self._claim(pair[0], values, words, pair, "sizes by layer lose less than equal ones")
            claim = "our default: attention divided by the queries that see a token loses less than their sum"
            self._claim(NORMALIZED, values, words, (NORMALIZED, OURS), claim)
            for name in ("SnapKV-like", "PyramidKV-like", "StreamingLLM-like", "random") if metric == "lost" else ():
                self._claim(OURS, values, words, (OURS, name), "lowest perplexity at equal budgets")
        for keep in KEPT:
            for place, words in enumerate(("worst relative error", "lowest retained mass")):
                for name in planted:
                    self.mean(name, f"{words}, kept {keep:.0%}", self._planted(name, keep, place))
        for metric, words in (("lost", "loss added, 10⁻³ nats"), ("divergence", "divergence, 10⁻³ nats")):
            for name in METHODS:
                for keep, of_seeds in self._curve(name, metric).items():
                    self.mean(name, f"{words}, kept {keep:.0%}", of_seeds)
        for name in self.speed[0]["found"] if self.speed else ():
            column = "transformers' default" if name == "default" else f"kept {float(name):.0%}"
            times, held = zip(*(run["found"][name] for run in self.speed), strict=True)
            words = f"{copies} rows of {length} bytes"
            self.mean(column, f"CPU time of a step, {words}", [1e3 * each for each in times], unit="ms")
            self.mean(column, f"keys and values, {words}", [each / 2**20 for each in held], unit="MiB")
        gains = [run["found"]["1.0"][0] / run["found"]["0.2"][0] for run in self.speed]
        words = "steps per second with a fifth kept over those with everything"
        self.claim(OURS, words, gains, "faster with 20% kept (1.8 times)", threshold=1.0)

    def _claim(
        self, method: str, values: dict[str, list[float]], words: str, pair: tuple[str, str], claim: str
    ) -> None:
        """What the first of two has less than the second, which held as many bytes."""
        own, other = pair
        if own in METHODS:
            assert self._curve(own, "bytes") == self._curve(other, "bytes")
        less = [b - a for a, b in zip(values[own], values[other], strict=True)]
        self.claim(method, f"{words}, {other} − {own}", less, claim)

    def _planted(self, name: str, keep: float, place: int) -> list[float]:
        return [run["found"][name][str(keep)][place] for run in self.planted]

    def _curve(self, method: str, metric: str) -> dict[float, list[float]]:
        """By share kept the values of all seeds; losses in thousandths."""
        scale = 1 if metric == "bytes" else 1e3
        columns = zip(*(run["found"][method] for run in self.quality), strict=True)
        found = {column[0]["kept"]: [scale * point[metric] for point in column] for column in columns}
        return {keep: found[keep] for keep in self.kept}

    def plot(self, figure: Any) -> None:
        """Four panels against the share kept."""
        panels = figure.subplots(1, 4 if self.planted else 2).tolist()
        loss, divergence = panels[-2:]
        if self.planted:
            planted, speed = panels[:2]
            for method in self.planted[0]["found"]:
                _errorbar(planted, KEPT, [self._planted(method, keep, 0) for keep in KEPT], method)
            planted.set(title="planted layers, attention alone", ylabel="worst relative error of a layer", yscale="log")
            shares = (1.0, *KEPT)
            for place, (label, colour) in enumerate((("CPU time of a step", "C0"), ("bytes held", "C1"))):
                values = [
                    [run["found"][str(keep)][place] / run["found"]["1.0"][place] for run in self.speed]
                    for keep in shares
                ]
                _errorbar(speed, shares, values, label, color=colour)
            speed.set(title="decoding", ylabel="relative to everything kept", ylim=(0, None))
            planted.legend(fontsize=7)
            speed.legend(fontsize=7)
        for method in METHODS:
            for axis, metric in ((loss, "lost"), (divergence, "divergence")):
                curve = self._curve(method, metric)
                _errorbar(axis, self.kept, [curve[keep] for keep in self.kept], method)
        loss.set(title="text behind the prompt", ylabel=f"loss added, 10⁻³ nats per {self.unit}")
        divergence.set(
            title="text behind the prompt", ylabel="divergence from the whole cache, 10⁻³ nats", yscale="log"
        )
        for axis in panels:
            axis.set_xlabel("share kept")
            axis.grid(alpha=0.25)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=8)


def _errorbar(axis: Any, shares: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    means, errors = zip(*(mean_and_error(each) for each in values), strict=True)
    axis.errorbar(shares, means, yerr=np.nan_to_num(errors), marker="o", markersize=3, capsize=2, label=label, **style)
