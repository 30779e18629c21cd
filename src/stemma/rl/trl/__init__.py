"""TRL's `GRPOTrainer` and `RLOOTrainer` with every shared prefix encoded once: one import line changes.

<!-- no-run -->
```python
from stemma.rl.trl import GRPOTrainer  # instead of: from trl import GRPOTrainer
```

Everything else stays TRL's: options, rollouts, rewards, advantages, losses, logging, checkpoints. Two things differ.

1. TRL shuffles the rows of a generation batch before it cuts the batch into `steps_per_generation` slices, which
   scatters the G completions of a prompt. Here the groups stay whole and are shuffled among each other. No random
   number is drawn for it: a group takes the place of the first of its rows in TRL's own shuffle.
2. The per-token log-probabilities and entropies of the policy, of the old policy and of the reference (a model, or
   PEFT's disabled or "ref" adapter) come from `stemma.score` over the prefix tree of the slice, and with them the
   load-balancing loss of a mixture of experts.

Two metrics join TRL's log: `stemma/token_ratio`, tokens of all rows over distinct tokens (mean over the scoring calls
since the last log), and `stemma/forwarded_tokens`, tokens that went through a model to be scored since the last log, by
policy, old policy and reference on all processes.

Differences from stock TRL to know about:

- TRL left-pads prompts and passes no position ids, so a row's first position is its number of padding tokens. With
  rotary embeddings that changes nothing but rounding. With learned positions (GPT-2) stock TRL trains each row at
  shifted positions, other than those it was sampled at; here every row is scored as if it were alone, from position 0.
- The log-probability and entropy of a masked column are 0.
- Images and other multimodal inputs, active dropout, `use_liger_kernel` and `use_transformers_continuous_batching` are
  refused by name. (TRL's `disable_dropout` reaches dropout layers, but not an `attention_dropout` of the config.)

Two arguments are its own. `max_tokens` is the most tokens in one forward: a slice with more distinct tokens is
streamed, in memory independent of the number of completions. `credit` (`GRPOTrainer` only) is the `hooks` of a method
that gives a credit, bound to options: `functools.partial(METHOD.hooks, METHOD.Config())`. What it gives to a token
beside the advantage of its row is added to TRL's advantages. Where that is nothing, and in the table of logged
completions, they stay as they are, to the bit. Options under which the credit of a token would not reach this token
are refused by name.

Rows may give their prompt as token ids, in the format of Stemma's own trainer: with a column `prompt_ids` nothing is
tokenized again, and `prompt` is optional (the decoded question). Where `prefix_ids` holds the tail of `prompt_ids` that
belongs to the answer, reward functions get it as the beginning of the completion, and `prompt_ids` without
it; rows for evaluation must have none.

Choose `per_device_train_batch_size` as a multiple of `num_generations`: a group that is cut between two slices has its
prompt encoded in both.

Source: "Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward", 2025, arXiv 2506.05433.

No `Config`: the options are those of TRL's `GRPOConfig` and `RLOOConfig`, and the two arguments above.

No `run`: the paper claims speed at equal results, which benchmarks/speed.py measures beside its released code.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from stemma.errors import MissingExtraError, StemmaError
from stemma.models.adapter import in_mode
from stemma.prefix.tree import PrefixTree
from stemma.rl.engine.hooks import Run
from stemma.rl.trl.rows import TokenCredit, TokenPrompts
from stemma.scoring.enable import enable
from stemma.scoring.score import score

if TYPE_CHECKING:
    from trl import GRPOTrainer, RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer"]

TESTED_VERSIONS = ">=1.16,<1.17"
"""The releases of TRL that the contract tests of this module run against; others are refused."""

_HOOKS = (
    "_prepare_inputs",
    "_get_per_token_logps_and_entropies",
    "_generate_and_score_completions",
    "_tokenize_prompts",
    "_calculate_rewards",
    "_set_signature_columns_if_needed",
)
"""TRL's private methods that are overridden here and in `rows`."""


class _SharedPrefix(TokenCredit, TokenPrompts):
    """What both trainers change. Mixed in before TRL's class; the overridden methods are TRL's private hooks."""

    _buffered_inputs: Any  # TRL's: the slices of the current generation batch

    def __init__(
        self,
        *args: Any,
        max_tokens: int | None = None,
        credit: Callable[[Run], Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        _refuse_what_cannot_be_shared(self)
        if credit is not None:
            self._set_credit(credit)
        enable(self.model)
        if self.ref_model is not None:
            # The same architecture, which has just passed; here accelerate may already have added autocast to it.
            enable(self.ref_model, self_test=False)
        _rehearse(self.model)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not buffered:  # TRL has just generated, shuffled and cut a new batch
            self._buffered_inputs = keep_groups_whole(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        given = sorted(name for name, value in multimodal.items() if value is not None)
        if given:
            raise StemmaError(
                f"{type(self).__name__} cannot share prefixes between rows with {', '.join(given)}; train on text, or "
                f"import {type(self).__name__} from trl"
            )
        rows = batch_size or input_ids.size(0)
        logps: list[torch.Tensor] = []
        entropies: list[torch.Tensor] = []
        aux_losses: list[Any] = []
        total_tokens = unique_tokens = forwarded_tokens = 0
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            tree = PrefixTree.from_padded(ids, mask, logits_to_keep=logits_to_keep)
            with self.accelerator.autocast():
                scores = score(
                    model,
                    tree,
                    temperature=self.temperature,
                    entropy=compute_entropy,
                    aux_loss=compute_aux_loss,
                    max_tokens=self.max_tokens,
                )
            logps.append(scores.padded())
            if compute_entropy:
                entropies.append(scores.padded(which="entropies"))
            if compute_aux_loss:
                aux_losses.append(scores.aux_loss)
            total_tokens += tree.total_tokens
            unique_tokens += tree.unique_tokens
            forwarded_tokens += scores.forwarded_tokens
        self._log_shared_prefix(total_tokens, unique_tokens, forwarded_tokens)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _log_shared_prefix(self, *tokens: int) -> None:
        counts = torch.tensor(tokens, device=self.accelerator.device)
        total, unique, forwarded = self.accelerator.reduce(counts, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["stemma/token_ratio"].append(total / unique)
        # TRL logs the mean of each list: one running entry makes it the sum.
        metrics["stemma/forwarded_tokens"] = [sum(metrics["stemma/forwarded_tokens"]) + forwarded]


def keep_groups_whole(slices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `slices`, dealt again so that the rows of one prompt stand side by side.

    A group takes the place of its first row and rows keep their order inside the group, so shuffled rows become
    shuffled groups of shuffled rows. A group is cut between slices only where the slice size forces it.

    Args:
        slices: dictionaries with the same keys and the same number of rows R. `prompt_ids` and `prompt_mask` are
            (R, P) and identify the group; other values are tensors or lists of R rows, or, as a 0-dimensional tensor
            or None, belong to the whole batch.

    Raises:
        StemmaError: a value does not have one row per sequence.
    """
    prompts = torch.cat([torch.cat([part["prompt_ids"], part["prompt_mask"]], dim=1) for part in slices])
    # Whole prompts decide, not adjacency: equal prompts are one group wherever the shuffle has put them.
    group = torch.unique(prompts, dim=0, return_inverse=True)[1]
    row = torch.arange(len(group), device=group.device)
    first_row = torch.full_like(group, len(group)).scatter_reduce(0, group, row, "amin")
    order = first_row[group].argsort(stable=True).view(len(slices), -1)
    dealt: list[dict[str, Any]] = [{} for _ in slices]
    for key in slices[0]:
        values = [part[key] for part in slices]
        for part, rows in zip(dealt, order, strict=True):
            part[key] = _take(key, values, rows, len(group))
    return dealt


def _take(key: str, values: list[Any], rows: torch.Tensor, num_rows: int) -> Any:
    first = values[0]
    if first is None or (isinstance(first, torch.Tensor) and first.ndim == 0):
        return first
    whole: Any = torch.cat(values) if isinstance(first, torch.Tensor) else [row for value in values for row in value]
    if len(whole) != num_rows:
        raise StemmaError(
            f"cannot keep groups whole: the batch entry {key!r} has {len(whole)} rows where the batch has {num_rows} "
            "sequences; expected one row per sequence"
        )
    return whole[rows] if isinstance(first, torch.Tensor) else [whole[row] for row in rows.tolist()]


def _refuse_what_cannot_be_shared(trainer: Any) -> None:
    name, args = type(trainer).__name__, trainer.args
    if trainer._is_vlm:
        raise StemmaError(
            f"{name} shares prefixes between rows of text only, and {type(trainer.processing_class).__name__} is a "
            f"multimodal processor; pass its tokenizer as processing_class, or import {name} from trl"
        )
    if args.use_liger_kernel:
        raise StemmaError(
            "use_liger_kernel=True replaces layers of the model when training starts, which is not tested over a "
            "shared prefix; leave it out (TRL deprecates it too)"
        )
    if getattr(args, "use_transformers_continuous_batching", False):  # RLOO has no such option
        raise StemmaError(
            "use_transformers_continuous_batching=True generates through transformers' own attention implementations "
            "only, and the shared forward registers one of its own; leave it out or generate with use_vllm=True"
        )
    if args.per_device_train_batch_size % trainer.num_generations:
        warnings.warn(
            f"per_device_train_batch_size={args.per_device_train_batch_size} is not a multiple of "
            f"num_generations={trainer.num_generations}: groups are cut between slices, and a prompt is encoded in "
            "each slice that holds a part of its group",
            stacklevel=3,
        )


def _rehearse(model: Any) -> None:
    """Scores a few tokens in training mode: what refuses to be trained does so now, not after the first rollouts."""
    if any(parameter.is_meta or not parameter.numel() for parameter in model.parameters()):
        return  # weights that are sharded or not loaded yet
    tree = PrefixTree.from_groups([list(range(9))], [[[0], [1]]])
    with in_mode(model, training=True), torch.no_grad(), torch.random.fork_rng():
        score(model, tree, mode="shared")


def _tested_trainer(name: str) -> type:
    """TRL's class of this name, if it is of a tested version and its private hooks are the ones replaced here."""
    try:
        import trl
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        raise MissingExtraError("trl", "trl", f"stemma.rl.trl.{name}") from error
    remedy = f"install a tested one (pip install 'trl{TESTED_VERSIONS}') or train with stemma.rl instead"
    if trl.__version__ not in SpecifierSet(TESTED_VERSIONS):
        raise StemmaError(
            f"stemma.rl.trl is tested with trl{TESTED_VERSIONS}, and trl {trl.__version__} is installed; {remedy}"
        )
    trainer: type = getattr(trl, name)
    for hook in _HOOKS:
        replaced = getattr(trainer, hook, None)
        found = list(inspect.signature(replaced).parameters.values()) if replaced else []
        ours = list(inspect.signature(getattr(_SharedPrefix, hook)).parameters.values())
        expected = [parameter.name for parameter in ours if parameter.kind is not parameter.VAR_KEYWORD]
        further = found[len(expected) :]
        # A further optional argument does no harm: the scoring call refuses it by name as soon as it is used.
        if [parameter.name for parameter in found[: len(expected)]] != expected or any(
            parameter.default is not None for parameter in further
        ):
            raise StemmaError(
                f"trl {trl.__version__} has {name}.{hook}({', '.join(p.name for p in found)}) where "
                f"({', '.join(expected)}) and arguments that default to None are expected, so it would not be "
                f"replaced faithfully; {remedy}"
            )
    return trainer


def __getattr__(name: str) -> Any:
    # Built on first use: importing this module does not import trl.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = _tested_trainer(name)
    namespace = {"__module__": __name__, "__qualname__": name, "__doc__": f"TRL's {name} over shared prefixes."}
    trainer = type(name, (_SharedPrefix, base), namespace)
    globals()[name] = trainer
    return trainer
