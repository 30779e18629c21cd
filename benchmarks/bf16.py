"""Error of the shared prefix's key and value gradients in bfloat16, against the number of responses.

Gathering keys per path (what flash kernels with variable lengths ask for) adds up G rounded copies of the prefix's
gradients in the backward of the gather, so its error grows with G. Tree attention reads the prefix where it lies.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from benchmarks.rows import Recorder
from benchmarks.workloads import groups

PREFIX, RESPONSE, HEADS, KEY_HEADS, HEAD_DIM = 256, 32, 4, 2, 64


def gathered_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, responses: int) -> torch.Tensor:
    """Prefix by itself, then each response over a gathered copy of its whole path; (1, heads, T, dim) throughout."""
    prefix = F.scaled_dot_product_attention(
        query[:, :, :PREFIX], key[:, :, :PREFIX], value[:, :, :PREFIX], is_causal=True, enable_gqa=True
    )
    own = PREFIX + torch.arange(responses * RESPONSE).view(responses, RESPONSE)
    paths = torch.cat([torch.arange(PREFIX).expand(responses, -1), own], dim=1)

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        picked = tensor[0].index_select(1, paths.flatten())
        return picked.unflatten(1, paths.shape).transpose(0, 1)

    visible = torch.ones(RESPONSE, PREFIX + RESPONSE, dtype=torch.bool).tril(PREFIX)
    asked = query[0, :, own].transpose(0, 1)
    below = F.scaled_dot_product_attention(asked, gather(key), gather(value), attn_mask=visible, enable_gqa=True)
    return torch.cat([prefix, below.transpose(0, 1).flatten(1, 2)[None]], dim=2)


def errors(responses: int, seed: int) -> dict[str, float]:
    """Relative L2 error of the prefix's key and value gradients of both schemes."""
    from stemma import PrefixTree
    from stemma.attention import tree_attention
    from stemma.prefix.layout import Layout

    workload = groups(f"bf16-{responses}", "", PREFIX, RESPONSE, responses)
    layout = Layout.of(PrefixTree.from_groups(workload.prompts, workload.responses))
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.num_tokens

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(torch.bfloat16)

    query, key, value, grad = normal(HEADS), normal(KEY_HEADS), normal(KEY_HEADS), normal(HEADS)

    def prefix_gradients(dtype: torch.dtype, attention: str) -> torch.Tensor:
        q, k, v = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, key, value))
        if attention == "gathered":
            output = gathered_attention(q, k, v, responses)
        else:
            output = tree_attention(q, k, v, layout)
        output.backward(grad.to(dtype))
        return torch.cat([k.grad[:, :, :PREFIX], v.grad[:, :, :PREFIX]]).double()

    exact = prefix_gradients(torch.float64, "gathered")
    agreement = (prefix_gradients(torch.float64, "stemma") - exact).norm() / exact.norm()
    if agreement > 1e-12:
        raise RuntimeError(f"the two schemes differ in float64, relative error {agreement:.1e}")
    return {
        name: float((prefix_gradients(torch.bfloat16, name) - exact).norm() / exact.norm())
        for name in ("stemma", "gathered")
    }


def run(recorder: Recorder, counts: tuple[int, ...] = (8, 16, 64, 256), seeds: int = 3) -> None:
    """Record the median over seeds for each number of responses."""
    for responses in counts:
        found = [errors(responses, seed) for seed in range(seeds)]
        for name in ("stemma", "gathered"):
            values = [error[name] for error in found]
            recorder.add(
                "bf16",
                workload=f"P{PREFIX}-R{RESPONSE}-G{responses}",
                method=name,
                metric="prefix_gradient_error",
                unit="relative L2",
                value=statistics.median(values),
                spread=(min(values), max(values)),
                repeats=seeds,
                baseline="float64",
                dtype="bfloat16",
                shapes={"heads": HEADS, "key_value_heads": KEY_HEADS, "head_dim": HEAD_DIM, "responses": responses},
            )
