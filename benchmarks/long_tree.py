"""A tree of 65 536 distinct tokens, forward and backward, every tensor's size on record: none is tokens × tokens."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.rows import Recorder
from benchmarks.workloads import Workload, groups

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation returned, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.operation = elements, str(func)
        return result


def make(scale: int = 1) -> Workload:
    """One prompt of 8192 tokens and 28 responses of 2048, every length divided by `scale`."""
    return groups("long", "P 8192, R 2048, G 28", 8192 // scale, 2048 // scale, 28)


def largest_tensor(workload: Workload, vocab_size: int) -> LargestTensor:
    """One shared step of a small model under the recorder."""
    model = measure.build_model(vocab_size=vocab_size, **MODEL)
    step = measure.prepared_step("stemma", workload, model)
    with LargestTensor() as largest:
        step()
    return largest


def limit(workload: Workload) -> int:
    """Most elements a tensor may have: one chunk of logits, or all tokens at the model's widest layer."""
    from stemma.prefix.logprob import CHUNK_ELEMENTS

    return max(CHUNK_ELEMENTS, workload.unique_tokens * MODEL["intermediate_size"])


def run(recorder: Recorder, scale: int = 1) -> None:
    """Assert the limit and record the largest tensor and the time.

    Raises:
        AssertionError: some tensor is larger than the limit.
    """
    workload = make(scale)
    tokens, start = workload.unique_tokens, time.process_time()
    largest = largest_tensor(workload, workload.vocab_size)
    seconds = time.process_time() - start
    assert largest.elements <= limit(workload), (
        f"{largest.operation} made {largest.elements} elements; at most {limit(workload)} expected for {tokens} tokens"
    )
    common: dict[str, Any] = {"workload": "long", "method": "stemma", "shapes": workload.shapes | MODEL}
    recorder.add("long_tree", metric="largest_tensor", unit="elements", value=largest.elements, **common)
    recorder.add("long_tree", metric="tokens_squared", unit="elements", value=tokens**2, **common)
    recorder.add("long_tree", metric="cpu_seconds", unit="s", value=seconds, **common)
