"""Run by test_grpo_fsdp.py in one process or, with FSDP2, in two: GRPO with sampling, a checkpoint, and going on."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from stemma.data import diallock
from stemma.models.tiny import tiny_model
from stemma.rl.grpo import Config, Trainer
from stemma.train import checkpoint
from stemma.train.sharding import full_model_state_dict


def prompts(generation: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [2 + (generation * count + i + t) % 19 for t in range(8 + i)]} for i in range(count)]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 13 / 13 for ids in completion_ids]


def main(folder: Path, family: str, per_device: int, options: str) -> None:
    accelerator, tokenizer = Accelerator(), diallock.tokenizer()

    def trainer() -> Trainer:
        seed = accelerator.process_index  # process 0 decides
        model = tiny_model(family, vocab_size=diallock.VOCAB_SIZE, dtype=torch.float64, seed=seed)
        config = Config(
            num_generations=4,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=2,
            max_completion_length=9,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            **json.loads(options),
        )
        return Trainer(
            model, config, prompts=prompts, reward_funcs=reward, processing_class=tokenizer, accelerator=accelerator
        )

    first = trainer()
    rows = [first.evaluate(prompts(9, 1)), first.step()]  # one prompt: the second process has nothing to sample
    parameters = list(first.model.parameters())
    if accelerator.num_processes > 1:
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = sum(parameter.to_local().numel() for parameter in parameters)
        errors = gather_object([rows[1].get("compare/gradient_error")])
        assert errors[0] == errors[1]  # of whole gradients, not of each process's part
        assert held < 0.6 * sum(parameter.numel() for parameter in parameters)
    state, weights = first.state_dict(), full_model_state_dict(first.model)
    if accelerator.is_main_process:
        checkpoint.save(
            folder, 1, model=first.model, processing_class=tokenizer, state=state, progress={}, weights=weights
        )
    accelerator.wait_for_everyone()
    rows += [first.step(), first.step()]

    second = trainer()
    saved = checkpoint.latest(folder)
    assert saved is not None
    checkpoint.load_weights(second.model, saved)
    second.load_state_dict(checkpoint.load_state(saved))
    again = [second.step(), second.step()]
    weights = full_model_state_dict(second.model) or second.model.state_dict()
    if accelerator.is_main_process:
        final = {name: value.tolist() for name, value in weights.items()}
        result = {"rows": rows, "again": again, "weights": final, "processes": accelerator.num_processes}
        (folder / "result.json").write_text(json.dumps(result))
    accelerator.end_training()  # a process that leaves its group open may abort on exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
