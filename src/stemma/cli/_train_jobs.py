"""What `stemma train` trains on: the model, the prompts and their verifier, and the supervised batches before them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stemma.cli._train_options import Config, needs
from stemma.data import diallock, gsm8k
from stemma.data.records import PromptRecord, read_jsonl
from stemma.errors import InvalidDataError
from stemma.files import digest
from stemma.models.limits import check_prompts
from stemma.models.loading import load_model, load_tokenizer, model_digest
from stemma.models.tiny import tiny_model
from stemma.models.tokens import text_ids
from stemma.rl.grpo import ShuffledRows
from stemma.train import sft
from stemma.train.seeds import stream_seed

__all__ = ["Job", "checkpoint_job", "diallock_job", "make_job", "supervised_trainer"]

Rows = list[dict[str, Any]]

_MAX_DISTANCE = 9  # of the problems that are asked; near ones, up to 4, are demonstrated
_SFT_BATCH_SIZE = 4


@dataclass(frozen=True)
class Job:
    """Everything about a run that depends on its task."""

    description: str
    model: Any
    processing_class: Any
    prompts: Callable[[int, int], Sequence[Mapping[str, Any]]]
    """`prompts(generation, count)`: the rows of one generation, with `demonstration_ids` where they were asked for."""
    reward: Callable[..., list[float | None]]
    eval_rows: Rows
    sft_batches: Callable[[int], dict[str, Tensor]]
    """`sft_batches(step)`: the labelled batch of one supervised step."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What `prompts` draws from, where that is a finite data set."""
    is_boundary: Callable[[Sequence[int], int], bool] | None = None
    """Whether a prefix of a solution (token ids) may end there; None: anywhere."""
    names: Sequence[str] = ()
    """File and line of each of `eval_rows` and `rows`."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files that it was made of, by the options that name them."""

    def check(self, max_new_tokens: int) -> None:
        """Refuse prompts that leave no room for a completion: all of a data set, of an endless source the first.

        Raises:
            InvalidBatchError: names the file and the line.
        """
        rows = [*self.eval_rows, *(self.rows or self.prompts(0, 64))]
        name = self.names.__getitem__ if self.names else "prompt {}".format
        check_prompts(self.model, [row["prompt_ids"] for row in rows], max_new_tokens, name)


def make_job(config: Config) -> Job:
    """The task of settings that are complete; see `diallock_job` and `checkpoint_job`."""
    common: dict[str, Any] = {
        "shots": config.shots or 0,
        "eval_prompts": config.eval_prompts,
        "seed": config.seed,
        "demonstrations": "demonstrations" in needs(config),
    }
    if config.model is None or config.dataset is None:
        return diallock_job(sft_steps=config.sft_steps or 0, **common)
    return checkpoint_job(config.model, config.dataset, **common)


def supervised_trainer(job: Job, config: Config, model: Any, accelerator: Any = None) -> sft.Trainer:
    """Trains `model` on the supervised batches of a task, with settings that are complete."""
    steps = config.sft_steps or 0
    options = sft.Config(
        max_steps=steps, learning_rate=config.sft_learning_rate or 0.0, warmup_steps=min(20, steps // 10)
    )
    return sft.Trainer(model, options, batches=job.sft_batches, accelerator=accelerator)


def diallock_job(*, shots: int, sft_steps: int, eval_prompts: int, seed: int, demonstrations: bool = False) -> Job:
    """A Llama of 200,000 parameters, made here, on DialLock with many-shot prompts.

    The warm-up shows noisy solutions of near problems, four to a sequence and in its last sixth as many as the prompts
    have. Reinforcement asks for problems up to distance 9, and is evaluated on problems that it never asks. A
    demonstration is a shortest solution.
    """
    near = diallock.problems("train", max_distance=4)
    asked = diallock.problems("train", max_distance=_MAX_DISTANCE)
    held_out = diallock.problems("test", max_distance=_MAX_DISTANCE)

    def rows(pool: list[diallock.Problem], count: int, rng: Random) -> Rows:
        found = []
        for problem in diallock.draw_problems(pool, count, rng):
            examples = diallock.draw_shots(near, shots, rng, exclude=problem)
            found.append({"prompt_ids": diallock.many_shot_prompt(examples, problem)})
            if demonstrations:
                found[-1]["demonstration_ids"] = diallock.oracle_episode(problem, rng).completion_ids
        return found

    def sft_batches(step: int) -> dict[str, Tensor]:
        episodes = shots + 1 if step >= sft_steps * 5 // 6 else 4
        rng = Random(stream_seed(seed, "sft", step))
        return diallock.packed_batch(near, rng, sequences=max(1, 32 // episodes), episodes=episodes)

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [diallock.reward(prompt, completion) for prompt, completion in zip(prompt_ids, completion_ids)]

    model = tiny_model(
        "llama",
        vocab_size=diallock.VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual 0.02 the warm-up needs twice the tokens
        eos_token_id=diallock.EOS_ID,
        pad_token_id=diallock.PAD_ID,
        seed=seed,
    )
    return Job(
        description=f"DialLock, {shots} solved examples in each prompt",
        model=model,
        processing_class=diallock.tokenizer(),
        prompts=lambda generation, count: rows(asked, count, Random(stream_seed(seed, "prompts", generation))),
        reward=reward,
        eval_rows=rows(held_out, eval_prompts, Random(stream_seed(seed, "eval"))) if eval_prompts else [],
        sft_batches=sft_batches,
    )


def checkpoint_job(
    model: str, dataset: Path, *, shots: int, eval_prompts: int, seed: int, demonstrations: bool = False
) -> Job:
    """A model from a folder or the hub on a JSONL file: GSM8K's `question` and `answer`, shown few-shot, or `prompt`
    and `answer` as they are. Either way the reward compares the final number (`stemma.data.gsm8k.reward`).

    Supervised sequences look like the prompts and are labelled on every answer in them. A demonstration is the answer
    of GSM8K, or the text of a field `demonstration` where a prompt has one.

    Raises:
        InvalidDataError: the file, an answer without a number, too few lines for the shots and the held-out prompts, or
            no demonstration in it.
        UnsupportedModelError: the model or its tokenizer cannot be loaded.
    """
    _, first = next(read_jsonl(dataset))
    items: list[Any]
    if "question" in first:
        items = gsm8k.read_problems(dataset)
        examples, items = items[:shots], items[shots:]
    else:
        shots, items = 0, gsm8k.read_answered_prompts(dataset)
        if demonstrations and all(record.demonstration is None for record in items):
            raise InvalidDataError(f"{dataset} demonstrates nothing; add solutions as text in a field 'demonstration'")
    held_out, asked = _split(items, eval_prompts, stream_seed(seed, "split"))
    if len(asked) <= shots:
        raise InvalidDataError(
            f"{dataset} has {len(items)} prompts besides {shots} shots, and {eval_prompts} are held out for "
            "evaluation; give more lines or a smaller --eval-prompts"
        )
    tokenizer = load_tokenizer(model)

    def records(chosen: list[Any]) -> list[PromptRecord]:
        if not chosen or "question" not in first:
            return chosen
        found = gsm8k.prompt_records(chosen, examples)
        return [replace(record, demonstration=record.answer) for record in found] if demonstrations else found

    def sft_batches(step: int) -> dict[str, Tensor]:
        rng = Random(stream_seed(seed, "sft", step))
        drawn: list[list[Any]] = [rng.sample(asked, shots + 1) for _ in range(_SFT_BATCH_SIZE)]
        if "question" not in first:
            return _labelled(tokenizer, [[(row.prompt, row.answer)] for (row,) in drawn])
        question = "Question: {}\nAnswer:".format
        return _labelled(tokenizer, [[(question(p.question), p.answer) for p in row] for row in drawn])

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [gsm8k.reward(expected, completion) for expected, completion in zip(answer, completions)]

    asked_records, held_out_records = records(asked), records(held_out)
    rows = _EncodedRows(asked_records, tokenizer, demonstrations)
    return Job(
        description=f"{dataset.name}, {shots} examples in each prompt",
        model=load_model(model),
        processing_class=tokenizer,
        prompts=ShuffledRows(rows, seed=stream_seed(seed, "prompts")),
        reward=reward,
        eval_rows=list(_EncodedRows(held_out_records, tokenizer)),
        sft_batches=sft_batches,
        rows=rows,
        names=[record.where for record in (*held_out_records, *asked_records)],
        is_boundary=lambda ids, cut: gsm8k.final_text(tokenizer.decode(ids[:cut])) is None,
        inputs={"dataset": digest(dataset), "model": model_digest(model)},
    )


def _split(items: Sequence[Any], count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Held-out items and the others, in an order that each item's own text decides: it depends neither on the order of
    the file nor, but for the last places, on what else is in it. No text is on both sides."""

    def place(item: Any) -> str:
        return hashlib.sha256(f"{seed} {getattr(item, 'question', None) or item.prompt}".encode()).hexdigest()

    ordered = sorted(items, key=place)
    held_out = ordered[:count]
    taken = {place(item) for item in held_out}
    return held_out, [item for item in ordered if place(item) not in taken]


class _EncodedRows(Sequence[dict[str, Any]]):
    """Records as rows, tokenised when they are asked for: few-shot prompts of a whole data set are many tokens."""

    def __init__(self, records: Sequence[PromptRecord], tokenizer: Any, demonstrations: bool = False) -> None:
        self._records, self._tokenizer, self._demonstrations = records, tokenizer, demonstrations

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        record = self._records[index]
        ids = text_ids(self._tokenizer, record.prompt)
        row = {"prompt_ids": ids, "prompt": record.prompt, "answer": record.answer}
        if self._demonstrations and record.demonstration is not None:
            text = text_ids(self._tokenizer, f" {record.demonstration}", special_tokens=False)
            row["demonstration_ids"] = [*text, _end_token(self._tokenizer)]
        return row


def _end_token(tokenizer: Any) -> int:
    """The token that a labelled answer ends with."""
    if tokenizer.eos_token_id is None:
        raise InvalidDataError(
            "the tokenizer has no eos_token_id, with which answers to learn from end; set its eos_token and save it "
            "with the model again"
        )
    token: int = tokenizer.eos_token_id
    return token


def _labelled(tokenizer: Any, sequences: Sequence[Sequence[tuple[str, str]]]) -> dict[str, Tensor]:
    """Sequences of prompts with their answers, a blank line between them, labels on the answers alone."""
    all_ids, all_labels = [], []
    for pairs in sequences:
        ids: list[int] = []
        labels: list[int] = []
        for index, (prompt, answer) in enumerate(pairs):
            asked = text_ids(tokenizer, prompt if index == 0 else f"\n\n{prompt}", special_tokens=index == 0)
            answered = text_ids(tokenizer, f" {answer}", special_tokens=False)
            ids += asked + answered
            labels += [sft.IGNORED_LABEL] * len(asked) + answered
        all_ids.append(torch.tensor([*ids, _end_token(tokenizer)]))
        all_labels.append(torch.tensor([*labels, _end_token(tokenizer)]))
    return {
        "input_ids": pad_sequence(all_ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in all_ids], batch_first=True),
        "labels": pad_sequence(all_labels, batch_first=True, padding_value=sft.IGNORED_LABEL),
    }
