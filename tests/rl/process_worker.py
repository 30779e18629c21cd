"""Run by test_grpo_processes.py in one or more processes: GRPO steps whose rollouts depend on the prompts alone."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stemma.data import diallock
from stemma.models.tiny import tiny_model
from stemma.rl.grpo import Config, RolloutBatch, Trainer


def prompts(generation: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [2 + (generation * count + i + t) % 19 for t in range(20)]} for i in range(count)]


def rollout(model: Any, rows: Any, num_generations: int, seed: int) -> RolloutBatch:
    ids, lengths = [], []
    for row in rows:
        for g in range(num_generations):
            ids.append([(row["prompt_ids"][0] * (g + 1) + t) % 19 + 2 for t in range(6)])
            lengths.append(2 + (row["prompt_ids"][1] + g) % 5)
    columns = torch.arange(6)
    return RolloutBatch(
        prompt_ids=[row["prompt_ids"] for row in rows],
        group_id=torch.arange(len(rows)).repeat_interleave(num_generations),
        completion_ids=torch.tensor(ids),
        completion_mask=columns < torch.tensor(lengths)[:, None],
        truncated=torch.zeros(len(ids), dtype=torch.bool),
        forced_len=torch.zeros(len(ids), dtype=torch.int64),
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 13 / 13 for ids in completion_ids]


def main(output: str, per_device: int, options: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny_model(
        "gpt2",
        vocab_size=diallock.VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        dtype=torch.float64,
        seed=accelerator.process_index,  # process 0 decides
    )
    config = Config(
        num_generations=4,
        per_device_train_batch_size=per_device,
        max_completion_length=6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        **json.loads(options),
    )
    trainer = Trainer(
        model,
        config,
        prompts=prompts,
        reward_funcs=reward,
        processing_class=diallock.tokenizer(),
        rollout=rollout,
        accelerator=accelerator,
    )
    rows = [trainer.step() for _ in range(3)]
    rows.append(trainer.evaluate(prompts(9, 5)))
    state = trainer.state_dict()  # every process takes part
    if accelerator.is_main_process:
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        Path(output).write_text(json.dumps({"rows": rows, "weights": weights, "processes": len(state["batches"])}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
