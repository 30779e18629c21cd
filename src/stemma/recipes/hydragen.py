"""`stemma run hydragen`: decoding speed and cache size against prefix length, shared against dense caches.

The paper (CodeLlama on eight GPUs): up to 32 times the throughput of competitive baselines, and from a prefix of 1K to
one of 16K less than 15% of it lost where baselines lose 90%. Here, on one CPU core: a random Llama of 12.6 million
parameters, rows with one prefix, and the same greedy tokens from every cache. Prefixes are encoded before the clock
(CPU time of the thread) starts.

No `--model`: time and bytes depend on shapes, not on what weights say.
"""

import time
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from stemma.cache.plan import CALL_BYTES
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs
from stemma.recipes._statistics import mean_and_error
from stemma.scoring.enable import disable, enable
from stemma.train.seeds import stream

__all__ = ["run"]

SHARED, DENSE, EXPANDED = "shared", "dense, grown in place", "transformers' default, expanded"
_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 2048,
}
_MAX_DENSE_TOKENS = 1 << 17
"""Prompt tokens of all rows up to which dense caches are measured (2 GiB of keys and values)."""


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    rows, new = (8, 2) if options.quick else (32, 4)
    lengths = (64, 128) if options.quick else (512, 1024, 2048, 4096, 8192)
    about = {"model": "random Llama, 4 layers, 8 heads of 64, 12.6 million parameters", "rows": rows, "new tokens": new}
    report = _Report("hydragen", "Hydragen: decoding below a shared prefix", about, lengths)
    runs = Runs(options.folder / "runs" / "hydragen")
    for seed in range(options.seeds or (1 if options.quick else 5)):
        for prefix in lengths:
            for method in (SHARED, DENSE, EXPANDED):
                if method == SHARED or rows * prefix <= _MAX_DENSE_TOKENS:
                    setting = {"rows": rows, "prefix": prefix, "new": new, "shape": _SHAPE}
                    run = runs(method, seed, setting, partial(_measure, method, rows, prefix, new, seed))
                    report.found.setdefault((method, prefix), []).append(run)
    report.summarise()
    return report.write(options.folder)


@torch.no_grad()
def _measure(method: str, rows: int, prefix: int, new: int, seed: int) -> dict[str, Any]:
    """Tokens per CPU second, bytes of keys and values, and the tokens, for the comparison."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, max_position_embeddings=16384)).eval()
    generator = stream(seed, "prompts")
    head = torch.randint(0, _SHAPE["vocab_size"], (1, prefix), generator=generator)
    last = torch.randperm(_SHAPE["vocab_size"], generator=generator)[:rows, None]
    ids = torch.cat([head.expand(rows, -1), last], 1)
    if method == EXPANDED:
        cache: Cache = DynamicCache(config=model.config)
        model(head, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
    else:
        enable(model, self_test=False)
        call_bytes = CALL_BYTES if method == SHARED else 1 << 60
        cache = SharedPrefixCache.of(model, ids.tolist(), room=new, call_bytes=call_bytes)
    begin = time.thread_time()
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    seconds = time.thread_time() - begin
    disable(model)
    torch.set_num_threads(threads)
    if isinstance(cache, SharedPrefixCache):
        held = cache.states.prefix_bytes + cache.states.own_bytes
    else:
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return {"rate": rows * new / seconds, "bytes": held, "tokens": tokens[:, -new:].tolist()}


class _Report(Report):
    """The report of a comparison by prefix length."""

    caption = "tokens per second and cache size against prefix length"
    size = (10, 3.8)

    def __init__(self, name: str, title: str, about: dict[str, Any], lengths: tuple[int, ...]) -> None:
        super().__init__(name, title, about)
        self.lengths = lengths
        self.found: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def summarise(self) -> None:
        """Rates, sizes and the paper's claims."""
        for (method, prefix), runs in self.found.items():
            assert [run["tokens"] for run in runs] == [run["tokens"] for run in self.found[SHARED, prefix]]
            self.mean(method, f"tokens/s, prefix {prefix}", [run["rate"] for run in runs])
            self.record(method, f"cache, prefix {prefix}", runs[0]["bytes"] / 2**20, unit="MiB", repeats=len(runs))
        for baseline in (DENSE, EXPANDED):
            prefix = max(length for method, length in self.found if method == baseline)
            pairs = zip(self.found[SHARED, prefix], self.found[baseline, prefix], strict=True)
            words = f"tokens/s over those of the cache that is {baseline}, prefix {prefix}"
            claim = "more tokens a second than baselines (up to 32 times as many)"
            self.claim(SHARED, words, [own["rate"] / other["rate"] for own, other in pairs], claim, threshold=1.0)
        near, far = (1024, 8192) if 8192 in self.lengths else (self.lengths[0], self.lengths[-1])
        kept = [b["rate"] / a["rate"] for a, b in zip(self.found[SHARED, near], self.found[SHARED, far], strict=True)]
        words = f"share of the rate at {near} tokens that is left at {far}"
        self.claim(
            SHARED, words, kept, "a long prefix costs less than 15% of the rate (from 1K to 16K)", threshold=0.85
        )

    def plot(self, figure: Any) -> None:
        """Tokens per second and MiB of keys and values against the prefix length."""
        axes = figure.subplots(1, 2)
        for index, method in enumerate((SHARED, DENSE, EXPANDED)):
            known = [length for length in self.lengths if (method, length) in self.found]
            rates = [mean_and_error([run["rate"] for run in self.found[method, x]])[0] for x in known]
            sizes = [self.found[method, length][0]["bytes"] / 2**20 for length in known]
            for axis, values in zip(axes, (rates, sizes), strict=True):
                style = "--" if method == EXPANDED else "-"  # it holds as much as the dense one
                axis.plot(known, values, style, marker="o", markersize=3, color=f"C{index}", label=method)
        for axis, label in zip(axes, ("tokens per CPU second", "MiB of keys and values"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="prefix tokens", ylabel=label)
            axis.set_xticks(self.lengths, map(str, self.lengths))
            axis.minorticks_off()
            axis.grid(alpha=0.25)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(self.title, fontsize=10)
