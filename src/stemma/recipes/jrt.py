"""`stemma run jrt`: what repeating a prompt, or encoding it both ways, does for recall from a state of fixed size.

The paper (its synthetic study, and models of 360M and 1.3B parameters): what two sets have in common is easier to say
for a recurrent model when the smaller set comes first; reading twice or encoding both ways removes that dependence and
recalls more. Here: causal linear attention, the same with repeated prompts (JRT-Prompt), prefix linear attention
(JRT-RNN) and softmax attention, with equal steps, batches and parameters; and the time of a prefill against softmax
attention.

No `--model`: a recurrent model that reads twice is trained from scratch; no pretrained one has this mixer.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stemma.attention.linear import chunked_linear_attention, linear_state
from stemma.pretrain.jrt.layers import PrefixLinearAttentionConfig
from stemma.pretrain.jrt.model import PrefixLinearAttentionForCausalLM
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs
from stemma.recipes._statistics import mean_and_error
from stemma.train import fit
from stemma.train.seeds import stream, stream_seed

__all__ = [
    "Disjointness",
    "Examples",
    "Recall",
    "Setting",
    "prefill_flops",
    "rows_for",
    "run",
    "train",
]

_METHODS = {
    "causal": "linear",
    "JRT-Prompt": "linear",
    "JRT-RNN": "prefix_linear",
    "softmax": "sliding",
}
_BETWEEN, _ASK = range(2)
_WORDS = 2  # the first id of an element, key or value


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows of one length (that of all kinds of a task): a context and what is asked behind it."""

    context: Tensor
    """`(rows, C)`."""
    question: Tensor
    """`(rows, Q)`."""
    labels: Tensor
    """`(rows, Q)`: the answer to predict *at* a token of the question, or -100."""
    kind: str


@dataclass(frozen=True, kw_only=True)
class Disjointness:
    """Two sets with one element in common: which? (The published code asks the same of its set disjointness.)"""

    name: str = "set disjointness"
    steps: int = 800
    short: int = 2
    long: int = 16
    words: int = 32

    def draw(self, rows: int, generator: torch.Generator) -> list[Examples]:
        """Half of the rows with the short set first, half with the long one."""
        found = []
        for kind in ("short first", "long first"):
            elements = torch.rand(rows // 2, self.words, generator=generator).argsort(dim=1) + _WORDS
            short, long = elements[:, : self.short], elements[:, self.short : self.short + self.long]
            of_short, of_long = (torch.randint(n, (rows // 2, 1), generator=generator) for n in (self.short, self.long))
            common = short.gather(1, of_short)
            long = torch.where(torch.arange(self.long) == of_long, common, long)
            between = torch.full((rows // 2, 1), _BETWEEN)
            sets = (short, between, long) if kind == "short first" else (long, between, short)
            question = torch.full((rows // 2, 1), _ASK)
            found.append(Examples(context=torch.cat(sets, dim=1), question=question, labels=common, kind=kind))
        return found


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Keys and their values, then some of the keys: say their values."""

    name: str = "multi-query recall"
    steps: int = 400
    pairs: int = 8
    queries: int = 4
    words: int = 12

    def draw(self, rows: int, generator: torch.Generator) -> list[Examples]:
        """Rows of one kind."""
        keys = torch.rand(rows, self.words, generator=generator).argsort(dim=1)[:, : self.pairs] + _WORDS
        values = torch.randint(self.words, (rows, self.pairs), generator=generator) + _WORDS + self.words
        asked = torch.rand(rows, self.pairs, generator=generator).argsort(dim=1)[:, : self.queries]
        question, answer = keys.gather(1, asked), values.gather(1, asked)
        return [
            Examples(
                context=torch.stack([keys, values], dim=2).flatten(1),
                question=torch.stack([question, answer], dim=2).flatten(1),
                labels=torch.stack([answer, torch.full_like(answer, -100)], dim=2).flatten(1),
                kind="any",
            )
        ]


Task = Disjointness | Recall


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run depends on besides its method, state size and seed."""

    batch: int = 64
    learning_rate: float = 4e-3
    hidden_size: int = 32
    heads: int = 2
    test_rows: int = 1024

    def config(self, mixer: str, feature_dim: int, task: Task, width: int = 64) -> PrefixLinearAttentionConfig:
        """Two mixers, each behind a short convolution."""
        return PrefixLinearAttentionConfig(
            vocab_size=_WORDS + 2 * task.words,
            hidden_size=self.hidden_size,
            intermediate_size=width,
            num_attention_heads=self.heads,
            feature_dim=feature_dim,
            mixer_types=["conv", mixer] * 2,
            sliding_window=1024,
            initializer_range=self.hidden_size**-0.5,
        )

    def state_size(self, feature_dim: int) -> int:
        """Numbers in the state of one layer of linear attention."""
        return self.heads * (1 + feature_dim + feature_dim**2) * (self.hidden_size // self.heads + 1)

    def model(self, method: str, feature_dim: int, task: Task, seed: int) -> PrefixLinearAttentionForCausalLM:
        """A model with as many parameters as that of JRT-RNN, up to one unit of the feed-forward layers' width."""
        largest = PrefixLinearAttentionForCausalLM(self.config("prefix_linear", feature_dim, task)).num_parameters()
        own = PrefixLinearAttentionForCausalLM(self.config(_METHODS[method], feature_dim, task)).num_parameters()
        width = 64 + round((largest - own) / (4 * 3 * self.hidden_size))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "init"))
            return PrefixLinearAttentionForCausalLM(self.config(_METHODS[method], feature_dim, task, width))


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    setting = Setting(batch=16, test_rows=64) if options.quick else Setting()
    sizes = (2,) if options.quick else (2, 6)
    seeds = range(options.seeds or (1 if options.quick else 5))
    tasks: tuple[Task, ...] = (Disjointness(), Recall())
    if options.quick:
        tasks = tuple(replace(task, steps=6) for task in tasks)
    about = {
        "model": f"2 × (short convolution, mixer), width {setting.hidden_size}, {setting.heads} heads",
        "parameters": "as many in all methods, up to one unit of the feed-forward width",
        "training": f"steps of {setting.batch} rows, AdamW, {setting.learning_rate:g} falling linearly",
        "loss": "the answers' tokens, for all methods",
        "state sizes": ", ".join(f"{setting.state_size(f)} numbers a layer (f = {f})" for f in sizes),
        **{task.name: ", ".join(f"{k} {v}" for k, v in asdict(task).items() if k != "name") for task in tasks},
    }
    report = _Report("jrt", "Just read twice: recall from a state of fixed size", about)
    report.caption = "accuracy against state size, and prefill time against length"
    runs = Runs(options.folder / "runs" / "jrt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _measure(report, runs, setting, tasks, sizes, seeds)
        report.prefill(runs, (256, 512, 1024) if options.quick else (512, 1024, 2048, 4096, 8192))
    finally:
        torch.set_num_threads(threads)
    return report.write(options.folder)


def _measure(
    report: "_Report", runs: Runs, setting: Setting, tasks: Sequence[Task], sizes: Sequence[int], seeds: Sequence[int]
) -> None:
    """Train every model, or read what was trained before."""
    for task in tasks:
        for seed in seeds:
            for method in _METHODS:
                for f in sizes if method != "softmax" else sizes[-1:]:
                    settings = {**asdict(setting), "task": asdict(task), "f": f}
                    result = runs(method, seed, settings, partial(train, setting, method, f, task, seed))
                    report.accuracies.setdefault((task.name, method, f), []).append(result["accuracy"])
    report.summarise(setting, sizes)


def rows_for(method: str, examples: Examples) -> tuple[Tensor, Tensor, int]:
    """Token ids, the answers to predict at each of them (-100: none), and how many tokens are the prefix."""
    copies = [examples.context] * (2 if method == "JRT-Prompt" else 1)
    if len(copies) == 2:
        copies.insert(1, torch.full((len(examples.context), 1), _BETWEEN))
    context = torch.cat(copies, dim=1)
    ids = torch.cat([context, examples.question], dim=1)
    labels = torch.cat([torch.full_like(context, -100), examples.labels], dim=1)
    return ids, labels, context.shape[1]


def answer_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, summed."""
    logits = model(batch["input_ids"], prefix_lengths=batch["prefix_lengths"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["answers"].flatten(), reduction="sum"), {}


def train(setting: Setting, method: str, feature_dim: int, task: Task, seed: int) -> dict[str, Any]:
    """Train one model and measure it on rows it has not seen.

    Returns:
        `accuracy`, by kind of row; the `parameters` of the model; the last `loss`.
    """

    def batches(step: int) -> dict[str, Tensor]:
        drawn = task.draw(setting.batch, stream(seed, task.name, "train", step))
        rows, answers, prefixes = zip(*(rows_for(method, examples) for examples in drawn), strict=True)
        lengths = torch.full((setting.batch,), prefixes[0])
        return {"input_ids": torch.cat(rows), "prefix_lengths": lengths, "answers": torch.cat(answers)}

    model = setting.model(method, feature_dim, task, seed)
    config = fit.Config(
        max_steps=task.steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=task.steps // 20,
        adam_beta2=0.999,
    )
    losses: list[float] = []
    trainer = fit.Trainer(
        model, config, batches=batches, loss=answer_loss, num_items=lambda batch: int((batch["answers"] != -100).sum())
    )
    fit.run_steps(trainer, on_step=lambda metrics: losses.append(metrics["loss"]))
    model.eval()
    accuracy = {}
    for examples in task.draw(setting.test_rows, stream(seed, task.name, "test")):
        ids, labels, prefix = rows_for(method, examples)
        with torch.no_grad():
            logits = model(ids, prefix_lengths=torch.full((len(ids),), prefix), use_cache=False).logits
        asked = labels != -100
        accuracy[examples.kind] = (logits.argmax(-1) == labels)[asked].double().mean().item()
    return {"accuracy": accuracy, "parameters": model.num_parameters(), "loss": losses[-1]}


def prefill_flops(kind: str, length: int, *, heads: int, head_dim: int, feature_dim: int, chunk: int) -> int:
    """Multiplications and additions of one layer's attention over a prompt, projections left out."""
    if kind == "softmax":
        return 2 * heads * length * length * head_dim  # scores and values of the causal half
    features = 1 + feature_dim + feature_dim**2
    # Encoder sums, causal sums, reading the state; half of the chunk's pairs on average, scores and values.
    return heads * length * (6 * features * head_dim + chunk * (feature_dim + head_dim))


def prefill_times(
    lengths: Sequence[int], *, heads: int = 4, head_dim: int = 64, feature_dim: int = 8
) -> dict[str, Any]:
    """Thread time in seconds of one layer's attention over a prompt, five times each."""
    generator = stream(0, "prefill")
    times: dict[str, list[list[float]]] = {"softmax": [], "JRT-RNN": []}
    for length in lengths:
        q, k, e = (torch.randn(1, heads, length, feature_dim, generator=generator) for _ in range(3))
        query, key, value = (torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3))
        calls: dict[str, Callable[[], Any]] = {
            "softmax": partial(F.scaled_dot_product_attention, query, key, value, is_causal=True),
            "JRT-RNN": partial(_prefix_attention, q, k, value, e, key),
        }
        for name, call in calls.items():
            times[name].append([])
            with torch.no_grad():
                call()
                for _ in range(5):
                    started = time.thread_time()
                    call()
                    times[name][-1].append(time.thread_time() - started)
    shape = {"heads": heads, "head_dim": head_dim, "feature_dim": feature_dim}
    return {"lengths": list(lengths), "times": times, "shape": shape}


def _prefix_attention(query: Tensor, key: Tensor, value: Tensor, encoder_key: Tensor, encoder_value: Tensor) -> Tensor:
    return chunked_linear_attention(query, key, value, linear_state(encoder_key, encoder_value))[0]


class _Report(Report):
    """Accuracies in place of curves of rewards."""

    accuracies: dict[tuple[str, str, int], list[dict[str, float]]]
    """Of a task, a method and a feature dimension: one entry a seed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accuracies = {}
        self.points: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
        self.times: dict[str, Any] = {}

    def summarise(self, setting: Setting, sizes: Sequence[int]) -> None:
        """Means over seeds, and the paper's claims over pairs of one seed, each the mean over state sizes."""
        for (task, method, f), found in self.accuracies.items():
            size = f"{setting.state_size(f)} numbers" if method != "softmax" else "keys and values"
            for kind in found[0]:
                words = f"accuracy, {task}, {kind + ', ' if kind != 'any' else ''}{size}"
                self.mean(method, words, [accuracy[kind] for accuracy in found])
            mean, error = mean_and_error(self._means(task, method, [f]))
            self.points.setdefault((task, method), []).append((setting.state_size(f), mean, error))
        for task in dict.fromkeys(task for task, _, _ in self.accuracies):
            for method, claim in (
                ("JRT-Prompt", "reading twice recalls more"),
                ("JRT-RNN", "encoding both ways recalls more"),
            ):
                causal, words = self._means(task, "causal", sizes), f"accuracy, {task}, {method} − causal"
                self.claim(method, words, self._means(task, method, sizes), claim, than=("causal", causal))
            both, twice = (self._means(task, method, sizes) for method in ("JRT-RNN", "JRT-Prompt"))
            more = [a - b for a, b in zip(both, twice, strict=True)]
            self.mean("JRT-RNN", f"accuracy, {task}, JRT-RNN − JRT-Prompt", more)
        task = Disjointness().name
        gaps = {method: self._gaps(task, method, sizes) for method in ("causal", "JRT-Prompt", "JRT-RNN")}
        for method, values in gaps.items():
            self.mean(method, f"{task}, gap between the orders", values)
        for method in ("JRT-Prompt", "JRT-RNN"):
            words = f"{task}, gap between the orders, causal − {method}"
            less = [a - b for a, b in zip(gaps["causal"], gaps[method], strict=True)]
            self.claim(method, words, less, f"{method} depends less on the order")

    def _means(self, task: str, method: str, sizes: Sequence[int]) -> list[float]:
        """Accuracy of each seed: the mean over kinds of rows and state sizes."""
        seeds = zip(*(self.accuracies[task, method, f] for f in sizes), strict=True)
        return [fmean(fmean(accuracy.values()) for accuracy in of_sizes) for of_sizes in seeds]

    def _gaps(self, task: str, method: str, sizes: Sequence[int]) -> list[float]:
        """How far the orders of the sets are apart, for each seed: the mean over state sizes."""
        seeds = zip(*(self.accuracies[task, method, f] for f in sizes), strict=True)
        return [fmean(abs(a["short first"] - a["long first"]) for a in of_sizes) for of_sizes in seeds]

    def prefill(self, runs: Runs, lengths: Sequence[int]) -> None:
        """Times of a prefill, and the exponents with which they grow."""
        self.times = runs("prefill", 0, {"lengths": list(lengths), "repeats": 5}, lambda: prefill_times(lengths))
        times, shape = self.times["times"], self.times["shape"]
        for method, seconds in times.items():
            for length, values in zip(lengths, seconds, strict=True):
                words = f"prefill of {length} tokens, attention of one layer"
                self.mean(method, words, [1000 * value for value in values], unit="ms")
                flops = prefill_flops(method, length, chunk=64, **shape)
                self.record(method, f"FLOPs of {length} tokens", flops / 1e9, unit="GFLOP")
            best = [min(values) for values in seconds]
            slope = float(np.polyfit(np.log(lengths[-3:]), np.log(best[-3:]), 1)[0])
            self.record(method, "exponent of prefill time in length, three longest", slope)
        ratios = [a / b for a, b in zip(times["softmax"][-1], times["JRT-RNN"][-1], strict=True)]
        claim = "prefill is faster than softmax attention's on long prompts (19.2 times)"
        words = f"prefill of {lengths[-1]} tokens, time of softmax attention over that of JRT-RNN"
        self.claim("JRT-RNN", words, ratios, claim, threshold=1.0)

    def plot(self, figure: Any) -> None:
        """Accuracy against state size for each task; prefill time against length."""
        tasks = list(dict.fromkeys(task for task, _ in self.points))
        axes = figure.subplots(1, len(tasks) + 1)
        for axis, task in zip(axes, tasks, strict=False):
            for index, method in enumerate(_METHODS):
                sizes, means, errors = zip(*self.points[task, method], strict=True)
                if method == "softmax":
                    axis.axhline(means[0], color=f"C{index}", linestyle=":", label=method)
                else:
                    bars = [0.0 if math.isnan(error) else error for error in errors]
                    axis.errorbar(sizes, means, bars, marker="o", capsize=3, color=f"C{index}", label=method)
            axis.set(title=task, xlabel="numbers in the state of a layer", ylabel="accuracy, held-out rows")
        for name, seconds in self.times["times"].items():
            color = f"C{list(_METHODS).index(name)}"
            axes[-1].loglog(
                self.times["lengths"], [1000 * min(s) for s in seconds], marker="o", color=color, label=name
            )
        axes[-1].set(title="attention of one layer, one thread", xlabel="tokens of the prompt", ylabel="ms")
        axes[-1].set_xticks(self.times["lengths"], map(str, self.times["lengths"]))
        axes[-1].minorticks_off()
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
