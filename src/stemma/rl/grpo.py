"""GRPO: reinforcement learning from groups of completions, each shared prompt encoded once.

For every prompt, `G` completions are sampled and rewarded; the advantage of completion `i` is `A_i = (r_i - mean r) /
(std r + 1e-4)` within its group, and each token's loss is the clipped policy gradient `-min(rho A, clip(rho, 1 -
epsilon, 1 + epsilon_high) A) + beta KL` with `rho = pi / pi_old`. The G completions repeat one prompt, and often each
other's beginnings: the forward and backward run over the prefix tree of the whole micro-batch, in which every shared
token appears once, with the same result.

Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024, arXiv 2402.03300;
variants Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071), CISPO (2506.13585), RLOO (2402.14740), see
`stemma.rl.engine.losses` and `dynamic_sampling`; Prefix Grouper (2506.05433) for encoding the prompt once.

No `run`: it is the baseline of the other methods' reproductions, and benchmarks/speed.py measures what sharing saves.

What we changed: the denominators of every loss but bnpo are those of the whole optimiser batch over all processes, so
accumulation and process count do not change the loss; a group is never split between micro-batches or processes;
prompts are token ids and never travel through text. Under FSDP2 every process holds a whole copy of the policy while it
samples (see `stemma.train.sharding`). Option names and meanings follow TRL 1.16's `GRPOConfig`, without the prefix
`vllm_` where any sampler is meant.

```python
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.rl.grpo import Config, ShuffledRows, Trainer

tokenizer = byte_tokenizer()
model = tiny_model("llama", vocab_size=len(tokenizer))  # or AutoModelForCausalLM.from_pretrained(...)
rows = [{"prompt_ids": tokenizer.encode(f"one, two, three, {word}")} for word in ("four", "five")]


def has_comma(completions, **columns):
    return [float("," in text) for text in completions]


config = Config(max_steps=1, num_generations=4, per_device_train_batch_size=8, max_completion_length=6)
trainer = Trainer(
    model, config, prompts=ShuffledRows(rows, seed=0), reward_funcs=has_comma, processing_class=tokenizer
)
metrics = trainer.step()
print(metrics["tokens/sampled"] > 0)
# prints: True
```
"""

from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Run, ShuffledRows, end_token_ids
from stemma.rl.engine.options import Config
from stemma.rl.engine.trainer import Trainer, check

__all__ = [
    "Config",
    "RolloutBatch",
    "Run",
    "ShuffledRows",
    "Trainer",
    "check",
    "end_token_ids",
]
