"""Decoding below a shared prefix, against what a dense cache can do: `python benchmarks/hydragen.py`.

Every method decodes the same rows with transformers' `generate`, greedily, and must give the same tokens; each row ends
in a token of its own. Prefilling and decoding are timed apart, in CPU time of the one thread (the machine may be busy).

| method | cache |
|---|---|
| `stemma` | the tree of prefixes, as planned |
| `stemma_always` | whatever two rows share is read once, planned or not |
| `stemma_dense` | the same code with all tokens in each row's own buffer |
| `hf_default` | `DynamicCache`, expanded to the rows: it is copied for every token |
| `in_place` | keys and values repeated for each row in buffers that grow in place, transformers' own attention |
| `view` | the prefix stored once and expanded without a copy, read row by row, merged with the rows' own tokens |
| `from_scratch` | `generate` on the repeated prompts |
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402

from benchmarks.rows import RESULTS, Recorder  # noqa: E402
from stemma.attention import decode  # noqa: E402
from stemma.attention.kernels import block_forward  # noqa: E402
from stemma.cache.plan import CALL_BYTES  # noqa: E402
from stemma.decode.shared_cache import SharedPrefixCache  # noqa: E402
from stemma.models.adapter import is_enabled  # noqa: E402
from stemma.scoring.enable import disable, enable  # noqa: E402

VOCAB_SIZE = 2048
CALLS = {"stemma": CALL_BYTES, "stemma_always": 0, "view": 0, "stemma_dense": 1 << 60}
DENSE = ("stemma_dense", "in_place", "hf_default")


def build_model(key_value_heads: int = 8) -> Any:
    """A random Llama of 12.6 million parameters: 4 layers, 8 heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=key_value_heads,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=32768,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Workload:
    """Rows with shared prefixes, each with a last token of its own."""

    name: str
    levels: tuple[tuple[int, int], ...]
    """(nodes, tokens of each) from the root down."""
    rows: int
    new: int = 8

    def ids(self) -> torch.Tensor:
        """``(rows, length)``."""
        generator = torch.Generator().manual_seed(1)
        parts = []
        for nodes, tokens in self.levels:
            runs = torch.randint(0, VOCAB_SIZE, (nodes, tokens), generator=generator)
            parts.append(runs.repeat_interleave(self.rows // nodes, 0))
        return torch.cat([*parts, torch.randperm(VOCAB_SIZE, generator=generator)[: self.rows, None]], 1)

    @property
    def shapes(self) -> dict[str, Any]:
        """For the rows of results."""
        return {"batch": self.rows, "levels": [list(level) for level in self.levels], "new": self.new}


def single(rows: int, prefix: int, new: int = 8) -> Workload:
    """One prefix for all rows."""
    return Workload(f"B{rows} P{prefix}", ((1, prefix),), rows, new)


class InPlaceLayer(DynamicLayer):
    """Keys and values of each row with room for what is to come."""

    def __init__(self, layer: DynamicLayer, source: torch.Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[2]
        self.rooms = [torch.nn.functional.pad(x, (0, 0, 0, room))[source] for x in (layer.keys, layer.values)]
        self.show()

    def show(self) -> None:
        """The filled part."""
        self.keys, self.values = (x[:, :, : self.length] for x in self.rooms)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        begin, self.length = self.length, self.length + key_states.shape[2]
        for room, new in zip(self.rooms, (key_states, value_states)):
            room[:, :, begin : self.length] = new
        self.show()
        return self.keys, self.values


def viewed(
    query: torch.Tensor, key_heads: int, segments: Sequence[Any], scale: float, order: Any, softcap: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one shared run, expanded to the rows as a view and read by each of them."""
    (segment,) = segments
    rows, heads, new, dim = query.shape
    key, value = (x.expand(rows, -1, -1, -1) for x in (segment.key, segment.value))
    asked = query.reshape(rows, key_heads, heads // key_heads, dim)
    output, sums = block_forward(asked, key, value, causal=False, scale=scale, softcap=softcap)
    return output.reshape(rows, heads, new, dim).transpose(1, 2), sums.reshape(rows, heads, new).transpose(1, 2)


@dataclass
class Timing:
    """One call of a method."""

    prefill: float
    decode: float
    cache_bytes: int
    tokens: torch.Tensor


@torch.no_grad()
def measure(model: Any, workload: Workload, method: str) -> Timing:
    """Prefill and decode once."""
    ids, cache = workload.ids(), None
    if method in CALLS and not is_enabled(model):
        enable(model, self_test=False)
    elif method not in CALLS:
        disable(model)
    begin = time.thread_time()
    if method in CALLS:
        cache = SharedPrefixCache.of(model, ids.tolist(), room=workload.new, call_bytes=CALLS[method])
    elif method != "from_scratch":
        cache = dense_cache(model, workload, ids, in_place=method == "in_place")
    middle = time.thread_time()
    with mock.patch.object(decode, "_shared", viewed) if method == "view" else nullcontext():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **({} if cache is None else {"past_key_values": cache}),
        )
    end = time.thread_time()
    return Timing(middle - begin, end - middle, 0 if cache is None else cache_bytes(cache), tokens[:, ids.shape[1] :])


def dense_cache(model: Any, workload: Workload, ids: torch.Tensor, in_place: bool) -> DynamicCache:
    """Each leaf's path encoded once, its keys and values repeated for the rows below it."""
    leaves = workload.levels[-1][0]
    each = workload.rows // leaves
    cache = DynamicCache(config=model.config)
    model(ids[::each, :-1], past_key_values=cache, logits_to_keep=1)
    if in_place:
        source = torch.arange(leaves).repeat_interleave(each)
        cache.layers = [InPlaceLayer(layer, source, workload.new) for layer in cache.layers]
    else:
        cache.batch_repeat_interleave(each)
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values, each storage counted once."""
    if isinstance(cache, SharedPrefixCache):
        return cache.states.prefix_bytes + cache.states.own_bytes
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def run(recorder: Recorder, model: Any, workload: Workload, methods: Sequence[str], repeats: int) -> None:
    """Measure methods in turns and record them."""
    timings: dict[str, list[Timing]] = {method: [] for method in methods}
    for turn in range(repeats):
        for method in methods if turn % 2 == 0 else reversed(methods):
            timings[method].append(measure(model, workload, method))
    expected = timings["stemma"][0].tokens
    made = workload.rows * workload.new
    best = {method: min(timing.decode for timing in found) for method, found in timings.items()}
    heads = model.config.num_key_value_heads
    common: dict[str, Any] = {"workload": f"{workload.name} K{heads}", "shapes": workload.shapes | {"kv_heads": heads}}
    for method, found in timings.items():
        assert all(torch.equal(timing.tokens, expected) for timing in found), f"{method} gives other tokens"
        seconds = [timing.decode for timing in found]
        common |= {"repeats": repeats, "method": method}

        def add(metric: str, unit: str, values: list[float], common: dict[str, Any] = common, **others: Any) -> None:
            value, spread = statistics.median(values), (min(values), max(values))
            recorder.add("hydragen", metric=metric, unit=unit, value=value, spread=spread, **common, **others)

        add("tokens_per_cpu_second", "1/s", [made / value for value in seconds])
        add("prefill_cpu_seconds", "s", [timing.prefill for timing in found])
        add("cache_bytes", "B", [found[0].cache_bytes])
        if method == "stemma":
            for baseline in methods[1:]:
                ratios = [other.decode / own for other, own in zip(timings[baseline], seconds)]
                value = statistics.median(seconds)
                add("cpu_speedup", "x", ratios, baseline=baseline, baseline_value=value * statistics.median(ratios))
    line = "  ".join(f"{method} {value / best['stemma']:.2f}" for method, value in best.items())
    print(f"{common['workload']:14} {made / best['stemma']:7.0f} tokens/s; time over stemma's: {line}", flush=True)


def roofline(recorder: Recorder, model: Any, workload: Workload) -> None:
    """CPU seconds that a step's matrix products take by themselves: weights, and queries with the prefix's keys."""
    config, rows = model.config, workload.rows
    prefix = sum(nodes * tokens for nodes, tokens in workload.levels)
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    hidden = {size: torch.randn(rows, size) for size in {weight.shape[1] for weight in weights}}
    group = config.num_attention_heads // config.num_key_value_heads
    key = torch.randn(1, config.num_key_value_heads, prefix, config.head_dim)
    query = torch.randn(1, config.num_key_value_heads, rows * group, config.head_dim)

    def products() -> None:
        for weight in weights:
            hidden[weight.shape[1]] @ weight.T

    def attention() -> None:
        for _ in range(config.num_hidden_layers):
            block_forward(query, key, key, causal=False, scale=1.0, softcap=None)

    for metric, step in (("roofline_weights", products), ("roofline_prefix", attention)):
        seconds = []
        for _ in range(4):
            begin = time.thread_time()
            step()
            seconds.append(time.thread_time() - begin)
        recorder.add(
            "hydragen",
            workload=f"{workload.name} K{config.num_key_value_heads}",
            method="stemma",
            metric=metric,
            unit="s",
            value=statistics.median(seconds[1:]),
            spread=(min(seconds[1:]), max(seconds[1:])),
            repeats=3,
            shapes=workload.shapes | {"kv_heads": config.num_key_value_heads},
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="headline,grid,prefix,trees,grouped", help="which, comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short prefixes, one repeat: shows that it runs; no rows")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    recorder, model, short = Recorder(1), build_model(), 8 if options.quick else 1
    repeats = 1 if options.quick else options.repeats
    best = ("stemma", *DENSE)
    for part in options.parts.split(","):
        if part == "headline":
            methods = (*best, "view", "stemma_always")
            run(recorder, model, single(32, 2048 // short, 6), methods, repeats)
            run(recorder, model, single(8, 512 // short, 8), (*best, "view", "from_scratch"), repeats)
        elif part == "grid":
            for rows, prefix in ((1, 64), (1, 1024), (4, 64), (4, 512), (16, 32), (16, 128), (16, 512), (32, 64)):
                run(recorder, model, single(rows, prefix // short), (*best, "stemma_always"), repeats)
        elif part == "prefix":
            for prefix in (1024, 4096, 8192, 16384):
                workload = single(32, prefix // short, 4)
                run(recorder, model, workload, ("stemma", "in_place") if prefix < 8192 else ("stemma",), repeats)
                roofline(recorder, model, workload)
        elif part == "trees":
            for name, levels in {
                "tree 1024+8x256": ((1, 1024 // short), (8, 256 // short)),
                "tree 512+4x128+16x64": ((1, 512 // short), (4, 128 // short), (16, 64 // short)),
                "tree 1024+16x16": ((1, 1024 // short), (16, 16)),
            }.items():
                run(recorder, model, Workload(name, levels, 32), (*best, "stemma_always"), repeats)
        elif part == "grouped":
            run(recorder, build_model(2), single(32, 2048 // short, 6), (*best, "view"), repeats)
        else:
            parser.error(f"unknown part {part!r}")
        if not options.quick:
            recorder.save(RESULTS)


if __name__ == "__main__":
    main()
