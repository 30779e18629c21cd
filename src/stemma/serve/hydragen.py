"""Hydragen: generate many sequences that share prefixes, each shared run of tokens encoded, kept and read once.

Use it to sample many completions of a prompt (rollouts, best of n, self-consistency), to ask many questions about one
document, or to serve a long few-shot prompt. The tokens are those of transformers' `generate`.

Source: "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024, arXiv 2402.05099. Attention over a prefix
and over the rest of a row are computed apart and merged by log-sum-exp (section 3.1; the equations are in
`stemma.attention.decode`); over the prefix, the queries of all rows below it make one matrix product (section 3.2,
"inter-sequence batching"); prefixes may themselves share a prefix (section 3.3, "hierarchical sharing").

What we changed and why:

- The tree is found from the token ids, with any number of levels and unequal groups; the paper's code takes levels from
  the caller, each dividing the next.
- A planner (`stemma.cache.plan`) merges a level into its children where its own kernel call would cost more than
  reading the copies; with one row nothing is shared, and the cache is the ordinary dense one.
- The prefix is encoded by the packed tree forward that trains and scores, so what is sampled and what is trained on
  come from the same attention.
- It is a transformers cache, so `generate` itself decodes: its processors, stopping criteria, sampling, beams.
- Partial attentions of low precision are merged in float32, not in the precision of the model.

Relations: `stemma.attention.tree` is the same decomposition with gradients.

```python
from stemma.models.tiny import tiny_model
from stemma.serve.hydragen import Config, generate

document = list(range(200))
out = generate(
    tiny_model("llama"), None, [document + [1], document + [2]], max_new_tokens=4, sharing=Config(share="always")
)
print(out.report.row_tokens, "tokens in rows,", out.report.encoded_tokens, "encoded")
# prints: 400 tokens in rows, 200 encoded
```
"""

from stemma.decode.generate import Config, Generations, generate, prompt_ids

__all__ = ["Config", "Generations", "generate", "prompt_ids"]
