"""What the trainers of `stemma.rl.trl` do with rows: prompts given as token ids, and the credit of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stemma.errors import InvalidDataError, StemmaError
from stemma.models.limits import vocabulary_size
from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Credit, Run
from stemma.rl.engine.options import Config
from stemma.rl.engine.rewards import question_and_beginning

__all__ = ["TokenCredit", "TokenPrompts"]

TOKEN_LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo")
"""TRL's losses that are a sum over tokens with the advantage of each token in its own summand."""

_Trainer: Any = object  # TRL's class follows in the bases of the trainers


class TokenPrompts(_Trainer):
    """Rows with a column `prompt_ids`: TRL's trainers sample from these token ids instead of tokenizing `prompt`."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # What remove_unused_columns=True keeps.
        self._signature_columns += [
            name for name in ("prompt_ids", "prefix_ids") if name not in self._signature_columns
        ]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = self._completed(inputs)
        return super()._generate_and_score_completions(self._rows)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if "prompt_ids" not in self._rows[0]:
            return super()._tokenize_prompts(prompts)
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        if any(row.get("prefix_ids") for row in inputs):
            asked, begun = zip(*map(question_and_beginning, inputs), strict=True)
            inputs = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, asked, strict=True)]
            completion_ids_list = [ids + rest for ids, rest in zip(begun, completion_ids_list, strict=True)]
            texts = self.processing_class.batch_decode(completion_ids_list, skip_special_tokens=True)
            completions = [
                text if isinstance(completion, str) else [{"role": "assistant", "content": text}]
                for text, completion in zip(texts, completions, strict=True)
            ]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _completed(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, checked, with a text under `prompt` for reward functions and logs."""
        given = [row.get("prompt_ids") is not None for row in rows]
        prefixed = any(row.get("prefix_ids") for row in rows)
        if not any(given):
            if prefixed:
                raise InvalidDataError(
                    "a row has prefix_ids without prompt_ids; put the token ids of question and prefix into prompt_ids"
                )
            return rows
        if not all(given):
            raise InvalidDataError("some rows have prompt_ids and some have none; give them to every row")
        if prefixed and not self.model.training:
            raise InvalidDataError(
                "an evaluation row has prefix_ids: a policy is evaluated on problems without a prefix; build the "
                "evaluation rows from the problems themselves"
            )
        for name in ("rollout_func", "tools", "environment_factories"):
            if getattr(self, name, None):
                raise StemmaError(f"rows with prompt_ids go straight to the model; {name} makes prompts of its own")
        vocab_size = vocabulary_size(self.model)
        completed = []
        for row in rows:
            asked, _ = question_and_beginning(row)
            if not asked or not 0 <= min(row["prompt_ids"]) <= max(row["prompt_ids"]) < vocab_size:
                raise InvalidDataError(
                    f"prompt_ids must hold at least one id, all of the model's vocabulary of {vocab_size}; got "
                    f"{row['prompt_ids']!r}"
                )
            prompt = row.get("prompt")
            completed.append({**row, "prompt": self.processing_class.decode(asked) if prompt is None else prompt})
        return completed


class TokenCredit(_Trainer):
    """TRL's advantages plus what a credit gives to each token beside the advantage of its row, as (B, T)."""

    _credit: Credit | None = None
    _row_credit: Credit

    def _set_credit(self, hooks: Callable[[Run], Mapping[str, Any]]) -> None:
        """Take the credit of a method.

        Raises:
            StemmaError: the method gives more than a credit, or see `refuse_token_credit`.
        """
        refuse_token_credit(self)
        size = self.num_generations
        options = Config(scale_rewards=self.scale_rewards, num_generations=size, per_device_train_batch_size=size)
        found = hooks(
            Run(
                options=options,
                model=self.model,
                processing_class=self.processing_class,
                accelerator=self.accelerator,
            )
        )
        if set(found) != {"credit"}:
            raise StemmaError(
                f"credit must give a credit and nothing else, it gives {', '.join(sorted(found)) or 'nothing'}; other "
                "hooks are of Stemma's own trainer"
            )
        self._credit = found["credit"]
        self._row_credit = GroupCredit(scale_rewards=self.scale_rewards, accelerator=self.accelerator)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._credit is not None:
            output["advantages"] = self._token_credit(output)
        return output

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = rewards, [len(ids) for ids in completion_ids_list]
        return rewards

    def _token_credit(self, output: dict[str, Any]) -> torch.Tensor:
        assert self._credit is not None
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        advantages, ids = output["advantages"], output["completion_ids"].cpu()
        count, width = ids.shape
        group = torch.arange(count) // size
        prompt_ids, prompt_mask = output["prompt_ids"].cpu(), output["prompt_mask"].cpu().bool()
        prompts = [row[mask].tolist() for row, mask in zip(prompt_ids, prompt_mask, strict=True)]
        if count % size or any(prompt != prompts[row // size * size] for row, prompt in enumerate(prompts)):
            raise StemmaError(
                f"credit needs the {size} completions of a prompt side by side on one process, and {count} rows came "
                "with other prompts among them; leave TRL's sampler as it is"
            )
        per_function, completion_lengths = self._scored  # rewards of all processes, completions of this one
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1).double()
        rewards[per_function.isnan().all(dim=1)] = torch.nan
        # From the lengths: mask_truncated_completions empties the mask of completions that others may begin like.
        lengths = torch.tensor(completion_lengths)
        batch = RolloutBatch(
            prompt_ids=prompts[::size],
            group_id=group,
            completion_ids=ids,
            completion_mask=torch.arange(width) < lengths[:, None],
            truncated=ids[torch.arange(count), lengths - 1] != self.processing_class.eos_token_id,
            forced_len=torch.zeros_like(lengths),
            reward=rewards[self.accelerator.process_index * count :][:count].cpu(),
        )
        for name, value in getattr(self._credit, "metrics", lambda _: {})(batch).items():
            self._metrics[mode][name].append(value)
        # A difference, so that TRL's advantages stay as they are where the credit adds nothing.
        own, row = self._credit(batch), self._row_credit(batch)[:, None]
        added = (own if own.ndim == 2 else own[:, None]) - row
        return advantages[:, None] + added.to(advantages).expand(-1, width)


def refuse_token_credit(trainer: Any) -> None:
    """Raise `StemmaError` for the options of TRL under which the credit of a token would not reach this token."""
    name, args = type(trainer).__name__, trainer.args
    if name == "RLOOTrainer":
        raise StemmaError(
            "credit does not go with RLOOTrainer, whose one ratio per completion spreads the credit of a token over "
            "all of them; use GRPOTrainer"
        )
    checks = {
        "importance_sampling_level": (args.importance_sampling_level == "token", "token"),
        "loss_type": (args.loss_type in TOKEN_LOSS_TYPES, f"one of {', '.join(TOKEN_LOSS_TYPES)}"),
        "off_policy_mask_threshold": (args.off_policy_mask_threshold is None, "None: it masks whole completions"),
        "multi_objective_aggregation": (
            args.multi_objective_aggregation == "sum_then_normalize",
            "sum_then_normalize: credit is given for one reward",
        ),
    }
    for option, (valid, expected) in checks.items():
        if not valid:
            raise StemmaError(
                f"credit needs {option} to be {expected}; got {getattr(args, option)!r}. Change it, or leave credit out"
            )
    for option, rows, size in (
        ("num_generations", args.per_device_train_batch_size * args.steps_per_generation, trainer.num_generations),
        ("num_generations_eval", args.per_device_eval_batch_size, trainer.num_generations_eval),
    ):
        cut = trainer.accelerator.num_processes > 1 and rows % size
        if size < 2 or (cut and (option == "num_generations" or args.eval_strategy != "no")):
            raise StemmaError(
                f"credit compares the completions of a prompt on one process: {option} must be at least 2 and "
                f"divide the {rows} completions that a process samples at a time; got {size}"
            )
