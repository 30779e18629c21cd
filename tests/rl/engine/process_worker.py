"""Run by test_grpo_processes.py in one or more processes: GRPO steps whose rollouts depend on the prompts alone."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stemma.data import diallock
from stemma.decode.rollout import Rollouts
from stemma.models.tiny import tiny_model
from stemma.rl.grpo import Config, Trainer


def prompts(generation: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [2 + (generation * count + i + t) % 19 for t in range(20)]} for i in range(count)]


def generator(model: Any, prompts: list[list[int]], /, *, num_generations: int, **_: Any) -> Rollouts:
    completions = [
        [[(prompt[0] * (g + 1) + t) % 19 + 2 for t in range(2 + (prompt[1] + g) % 5)] for g in range(num_generations)]
        for prompt in prompts
    ]
    return Rollouts(
        prompts=prompts,
        completions=completions,
        logprobs=[[torch.zeros(len(ids)) for ids in group] for group in completions],
        finished=[[True] * num_generations for _ in prompts],
        forced_lengths=[[0] * num_generations for _ in prompts],
        prefilled_tokens=0,
        decoded_tokens=0,
    )


def reward(completion_ids: list[list[int]], prompt_ids: list[list[int]], **_: Any) -> list[float]:
    """Completions of some prompts all get the same."""
    return [0.5 if prompt[0] % 3 == 0 else sum(ids) % 13 / 13 for prompt, ids in zip(prompt_ids, completion_ids)]


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
        generator=generator,
        accelerator=accelerator,
    )
    rows = [trainer.step() for _ in range(3)]
    rows.append(trainer.evaluate(prompts(9, 5)))
    state = trainer.state_dict()  # every process takes part
    if accelerator.is_main_process:
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        Path(output).write_text(json.dumps({"rows": rows, "weights": weights, "processes": len(state["batches"])}))
    accelerator.end_training()  # a process that leaves its group open may abort on exit


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
