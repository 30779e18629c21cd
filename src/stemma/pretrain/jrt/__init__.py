"""Just read twice: recall for models with a state of fixed size, by repeating the context or by encoding it both ways.

Use it to prompt or train recurrent language models. Such a model decides what to keep of a text before it has read the
question, so the order of the information matters. Two remedies:

- *JRT-Prompt*: the prompt has the context twice, `jrt_text`, `jrt_messages`, `jrt_ids`. No training, any model.
- *JRT-RNN*: the model reads the prompt both ways, `PrefixLinearAttentionForCausalLM`.

Source: "Just read twice: closing the recall gap for recurrent language models", 2024, arXiv 2407.05483. The equations
of prefix linear attention are in `stemma.attention.linear`. Training masks tokens of the prefix with probability 0.15,
predicts these where they stand and the tokens behind the prefix from the one before (`PrefixLMCollator`,
`prefix_lm_loss`):

| the paper | here |
|---|---|
| `M`, length of the encoder region | `prefix_lengths`, one per row |
| `k^e, v^e` | `PrefixLinearAttention.encoder_key`, `encoder_value` |
| `w_1 L_NTP + w_2 L_MLM` | `prefix_lm_loss`; weights 1 and `mlm_weight` = 0.25 (the code's) |

What we changed and why:

- Repeating the context and asking first are two options; the published prompts mix them, which confounds them.
- A budget of tokens shortens all copies alike, never the question.
- The last token of the prefix is never masked, as it predicts the first token behind it from the same logits.
- Tokens with id 0 are learned, and a batch without a masked token has a loss; the published code skips the one and
  gives NaN for the other.

Relations: prompts that ask about one context begin alike, so that `stemma.generate` encodes and keeps their copies of
it once, unless the question comes first. The model keeps a state of fixed size after the prefix, and no keys.

```python
from stemma.pretrain.jrt import Config, jrt_text

prompts = jrt_text("The dial turned left at noon.", ["When did it turn?"], config=Config(repeats=2))
print(prompts[0])
# prints: The dial turned left at noon.
# prints: The dial turned left at noon. When did it turn?
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.pretrain.jrt.layers import PrefixLinearAttention, PrefixLinearAttentionConfig, PrefixLinearCache
from stemma.pretrain.jrt.model import PrefixLinearAttentionForCausalLM, prefix_lm_loss
from stemma.train.seeds import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Config",
    "PrefixLMCollator",
    "PrefixLinearAttention",
    "PrefixLinearAttentionConfig",
    "PrefixLinearAttentionForCausalLM",
    "PrefixLinearCache",
    "jrt_ids",
    "jrt_messages",
    "jrt_text",
    "prefix_lm_loss",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a JRT-Prompt is laid out."""

    repeats: int = 2
    """Copies of the context, at least 1; the paper: 2."""
    question_first: bool = False
    """Put the question in front of the first copy too."""
    max_tokens: int | None = None
    """Most tokens of a prompt (special tokens and chat template included), at least 1; None: no limit. Longer contexts
    lose their end, in every copy alike."""

    def __post_init__(self) -> None:
        for name in ("repeats", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


def jrt_text(
    context: str,
    questions: Sequence[str],
    *,
    config: Config | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> list[str]:
    """One prompt per question: copies of the context on lines of their own, a space, the question.

    Args:
        context: what is read more than once.
        questions: asked about it, one or more; all get the same copies, so that their prompts begin alike.
        config: see `Config`.
        tokenizer: counts tokens; needed with `max_tokens` only.

    Raises:
        InvalidBatchError: a question leaves no token of the budget for the context, or there is no list of questions.
        ValueError: `max_tokens` without a tokenizer.
    """
    config = config or Config()

    def size(kept: int) -> int:
        assert tokenizer is not None
        return max(len(tokenizer(_text(context[:kept], question, config))["input_ids"]) for question in questions)

    kept = _longest(len(context), size, questions, _counted(config, tokenizer))
    return [_text(context[:kept], question, config) for question in questions]


def jrt_messages(
    context: str,
    questions: Sequence[str],
    *,
    config: Config | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    before: Sequence[Mapping[str, Any]] = (),
) -> list[list[dict[str, Any]]]:
    """Chats that end with a user's message of `jrt_text`.

    Args:
        context, questions, config: see `jrt_text`.
        tokenizer: its chat template is counted, with the generation prompt; needed with `max_tokens` only.
        before: messages in front, such as a system's; never shortened.

    Raises:
        InvalidBatchError, ValueError: see `jrt_text`.
    """
    config = config or Config()

    def chats(kept: int) -> list[list[dict[str, Any]]]:
        texts = (_text(context[:kept], question, config) for question in questions)
        return [[*(dict(message) for message in before), {"role": "user", "content": text}] for text in texts]

    def size(kept: int) -> int:
        assert tokenizer is not None
        rendered = (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats(kept)
        )
        return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered)

    return chats(_longest(len(context), size, questions, _counted(config, tokenizer)))


def jrt_ids(
    context: Sequence[int],
    questions: Sequence[Sequence[int]],
    *,
    config: Config | None = None,
    separator: Sequence[int] = (),
) -> list[list[int]]:
    """Prompts of token ids.

    Args:
        context: ids without special tokens.
        questions: ids of each question.
        config: see `Config`.
        separator: ids between copies, as those of a line break.

    Raises:
        InvalidBatchError: see `jrt_text`.
    """
    config = config or Config()

    def prompt(question: Sequence[int], kept: int) -> list[int]:
        ids = list(question) if config.question_first else []
        for copy in range(config.repeats):
            ids += [*(separator if copy else ()), *context[:kept]]
        return ids + list(question)

    def size(kept: int) -> int:
        return max(len(prompt(question, kept)) for question in questions)

    kept = _longest(len(context), size, questions, config.max_tokens)
    return [prompt(question, kept) for question in questions]


def _text(context: str, question: str, config: Config) -> str:
    copies = "\n".join([context] * config.repeats)
    return f"{question} {copies} {question}" if config.question_first else f"{copies} {question}"


def _counted(config: Config, tokenizer: Any) -> int | None:
    if config.max_tokens is not None and tokenizer is None:
        raise ValueError("max_tokens counts tokens: give the tokenizer.")
    return config.max_tokens


def _longest(total: int, size: Callable[[int], int], questions: Sequence[Any], budget: int | None) -> int:
    """How much of the context to keep: the most, up to `total`, whose prompts have been seen to fit the budget."""
    if isinstance(questions, str) or not questions:
        raise InvalidBatchError("give a list of at least one question")
    if budget is None:
        return total
    if size(total) <= budget:
        return total
    if size(min(total, 1)) > budget:
        raise InvalidBatchError(
            f"max_tokens is {budget}, but a prompt has {size(0)} tokens without any of its context; give a larger "
            "budget or a shorter question"
        )
    low, high = 1, total  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


@dataclass(kw_only=True)
class PrefixLMCollator:
    """Batches for `PrefixLinearAttentionForCausalLM`, also as the `data_collator` of transformers' Trainer.

    An example has `input_ids`; it may have `prefix_lengths` (a number, in place of `prefix_length`), `labels` (for the
    tokens behind its prefix, as `input_ids` when missing) and `attention_mask` (tokens with a 0, as of earlier padding,
    are left out). Rows are padded on the right.
    """

    pad_token_id: int
    """Fills rows up; those positions have no loss, also where texts hold this id."""
    mask_token_id: int
    """Stands in for a masked token, always (BERT's variants of it are not used); where texts hold it, it is not asked
    for."""
    prefix_length: int
    """Tokens of a row that the encoder sees, at least 0."""
    mlm_probability: float = 0.15
    """Share of the prefix's tokens that are masked, in [0, 1]."""
    seed: int = 0
    """Of the masks, which differ from call to call; in workers of a data loader the worker's seed, that is torch's,
    counts too, so that they differ between workers and epochs."""
    calls: int = field(default=0, init=False)
    """Batches made so far."""

    def __post_init__(self) -> None:
        if self.prefix_length < 0:
            raise ValueError(f"prefix_length must be at least 0, got {self.prefix_length}.")
        if not 0 <= self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be in [0, 1], got {self.mlm_probability}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (-100: no loss), all `(batch, T)`, and `prefix_lengths (batch,)`.

        Raises:
            InvalidDataError: an example without tokens, or whose labels or mask have another length.
        """
        worker = torch.utils.data.get_worker_info()
        generator = stream(self.seed, "prefix-lm-masks", worker.seed if worker else 0, self.calls)
        self.calls += 1
        texts = [_text_of(row, example) for row, example in enumerate(examples)]
        shape = (len(texts), max((len(ids) for ids, _ in texts), default=0))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, -100),
            "prefix_lengths": torch.zeros(len(examples), dtype=torch.int64),
        }
        for row, (example, (ids, labels)) in enumerate(zip(examples, texts, strict=True)):
            prefix = min(int(example.get("prefix_lengths", self.prefix_length)), len(ids))
            masked = torch.zeros(len(ids), dtype=torch.bool)
            masked[:prefix] = torch.rand(prefix, generator=generator) < self.mlm_probability
            masked &= ids != self.mask_token_id  # the input would show it
            if 0 < prefix < len(ids):
                masked[prefix - 1] = False  # its logits predict the next token
            behind = torch.arange(len(ids)) >= prefix
            real = slice(0, len(ids))
            batch["input_ids"][row, real] = ids.masked_fill(masked, self.mask_token_id)
            batch["labels"][row, real] = torch.where(masked, ids, labels.masked_fill(~behind, -100))
            batch["attention_mask"][row, real] = 1
            batch["prefix_lengths"][row] = prefix
        return batch


def _text_of(row: int, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Its token ids and labels, without padding."""
    ids = torch.as_tensor(example["input_ids"])
    labels = torch.as_tensor(example.get("labels", example["input_ids"]))
    text = torch.as_tensor(example.get("attention_mask", torch.ones_like(ids))).bool()
    if not text.any() or not labels.shape == ids.shape == text.shape:
        raise InvalidDataError(
            f"example {row} has {len(ids)} tokens ({int(text.sum())} outside padding), {len(labels)} labels and an "
            f"attention_mask of {len(text)}; needed are as many of each, and a token outside padding"
        )
    return ids[text], labels[text]
