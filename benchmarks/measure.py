"""How things are measured: the model, the cost model, interleaved timing, saved bytes and numerical error."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import prefix_grouper_adapter
from benchmarks.baselines import METHODS, TokenTrie, each_row_alone
from benchmarks.workloads import VOCAB_SIZE, Workload

MODEL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
"""The CPU configuration: a Llama of 13 million parameters with the proportions of a small real one."""


def build_model(
    dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE, seed: int = 0, **sizes: int
) -> torch.nn.Module:
    """A randomly initialised Llama in training mode, equal for equal seeds; float64 gets norms that stay in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**(MODEL | sizes), vocab_size=vocab_size, max_position_embeddings=16384)
    model = LlamaForCausalLM(config).to(dtype).train()
    if dtype == torch.float64:
        keep_norm_dtype(model)
    return model


def keep_norm_dtype(model: torch.nn.Module) -> None:
    """Replace the norms' forward: transformers' RMSNorm computes in float32, which hides errors below 1e-7."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = _rms_norm(module)  # type: ignore[method-assign]


def _rms_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    return forward


# -------------------- the cost model


@dataclass(frozen=True)
class Cost:
    """What a forward has to compute: `tokens` through the layers, attended `pairs`, `scored` positions at the head."""

    tokens: int
    pairs: float
    scored: int

    def flops(self, config: Any) -> float:
        """Floating-point operations of forward and backward, `3 (2 N T + 4 d L A + 2 h V M)`.

        N: weights of the layers, T: tokens, d: query width, L: layers, A: pairs, h: hidden size, V: vocabulary,
        M: scored positions. A causal square of n tokens counts n²/2 pairs.
        """
        hidden, head = config.hidden_size, config.head_dim
        query, key = config.num_attention_heads * head, config.num_key_value_heads * head
        weights = config.num_hidden_layers * (
            2 * hidden * query + 2 * hidden * key + 3 * hidden * config.intermediate_size
        )
        forward = (
            2 * weights * self.tokens
            + 4 * query * config.num_hidden_layers * self.pairs
            + 2 * hidden * config.vocab_size * self.scored
        )
        return 3 * forward


def padded_cost(workload: Workload) -> Cost:
    """Of the right-padded batch, padding included: that is what it computes."""
    count, length = len(workload.rows), max(map(len, workload.rows))
    scored = length - min(workload.prompt_lengths)
    return Cost(count * length, count * length**2 / 2, count * scored)


def shared_cost(workload: Workload) -> Cost:
    """Of every distinct token once: the least an exact method can compute."""
    trie = TokenTrie.build(workload)
    return Cost(len(trie.tokens), sum(trie.depths) + len(trie.depths) / 2, len(set(trie.predictors)))


def speed_bound(workload: Workload, config: Any) -> float:
    """Largest speed-up over the padded batch that the operation counts allow."""
    return padded_cost(workload).flops(config) / shared_cost(workload).flops(config)


# -------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, one entry per repetition."""

    cpu: list[float]
    wall: list[float]


@dataclass(frozen=True)
class Ratio:
    """Median of per-repetition ratios and their range."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numerator: list[float], denominator: list[float]) -> Ratio:
        """Ratios of neighbouring measurements: repetition k of one against repetition k of the other.

        Where one has fewer repetitions, the first blocks are the ones in which both ran.
        """
        ratios = [n / d for n, d in zip(numerator, denominator)]
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def interleaved(steps: dict[str, Callable[[], Any]], blocks: int, once: Collection[str] = ()) -> dict[str, Timing]:
    """Time every step twice per block, in the order A B C C B A, so that drift of the machine hits all alike.

    Steps named in `once` take part in the first block only. CPU time is that of the whole process, every thread
    included.
    """
    timings = {name: Timing([], []) for name in steps}
    for block in range(blocks):
        names = [name for name in steps if block == 0 or name not in once]
        for name in [*names, *reversed(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
    return timings


def prepared_step(method: str, workload: Workload, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
    """A closure that clears the gradients and runs one step of `method` on a model prepared for it."""
    METHODS[method].prepare(model)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return METHODS[method].step(model, workload)

    return step


# -------------------- saved for backward


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass: distinct storages, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        # The storages are kept alive while counting: an address that is freed and used again would be missed.
        self._storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._storages.setdefault(storage.data_ptr(), storage)
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(step: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes saved for backward by one step that has a single forward."""
    counter = SavedBytes(model)
    with counter:
        step()
    return counter.total


def attention_saved_bytes(method: str, workload: Workload) -> int:
    """Bytes that one layer's attention saves for backward, with its inputs and the output that the next layer keeps."""
    heads, key_heads, size = MODEL["num_attention_heads"], MODEL["num_key_value_heads"], 64
    if method == "hf_padded":
        rows, tokens = len(workload.rows), max(map(len, workload.rows))
    elif method == "prefix_grouper":
        grouper, ids, _, _ = prefix_grouper_adapter.pack(workload)
        rows, tokens = ids.shape
    else:
        rows, tokens = 1, workload.unique_tokens

    def projected(count: int) -> torch.Tensor:
        return torch.randn(rows, tokens, count, size).transpose(1, 2).requires_grad_()

    query, key, value = projected(heads), projected(key_heads), projected(key_heads)
    output_weight = torch.nn.Linear(heads * size, 1, bias=False)
    counter = SavedBytes(output_weight)
    with counter:
        if method == "hf_padded":
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
        elif method == "prefix_grouper":
            output, _ = prefix_grouper_adapter.attention(None, query, key, value, None, prefix_grouper=grouper)
        else:
            from stemma import PrefixTree
            from stemma.attention import tree_attention
            from stemma.prefix.layout import Layout

            tree = PrefixTree.from_groups(workload.prompts, workload.responses, min_shared=1)
            output = tree_attention(query, key, value, Layout.of(tree)).transpose(1, 2)
        output_weight(output.reshape(rows, tokens, -1)).sum()
    return counter.total


# -------------------- exactness


@dataclass(frozen=True)
class Error:
    """Distance from each row alone in float64."""

    logprob: float
    """Largest absolute difference of a log-probability."""
    gradient: float
    """Largest over the parameters of the largest absolute difference, relative to that parameter's largest gradient."""


@dataclass(frozen=True)
class Truth:
    """Log-probabilities and gradients of each row alone in float64."""

    logprobs: torch.Tensor
    gradients: dict[str, torch.Tensor]


def truth(workload: Workload) -> Truth:
    """Runs `each_row_alone` on a float64 model with dtype-preserving norms."""
    model = build_model(torch.float64, workload.vocab_size)
    logprobs = each_row_alone(model, workload)
    return Truth(logprobs, gradients(model))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached {missing[0]} ({len(missing)} parameters in all)")
    return {name: parameter.grad.double().clone() for name, parameter in model.named_parameters()}


def error(method: str, model: torch.nn.Module, workload: Workload, expected: Truth) -> Error:
    """Error of one method on a model of `build_model` against the float64 truth, over all tokens and parameters."""
    logprobs = prepared_step(method, workload, model)()
    worst = max(
        float((found - expected.gradients[name]).abs().max() / expected.gradients[name].abs().max())
        for name, found in gradients(model).items()
    )
    return Error(float((logprobs.double() - expected.logprobs).abs().max()), worst)
