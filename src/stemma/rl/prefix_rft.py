"""Prefix-RFT: some rollouts of a group begin with a piece of a demonstration, and learn from it what is uncertain.

Use it for problems with a demonstration that sampling alone rarely solves. Of the G completions of a prompt, G - 1 are
sampled freely and one continues the first L tokens of the demonstration; the verifier judges the whole text, and the
row is trained on like the others, its forced tokens included. Supervised and reinforcement learning in one loss, at no
extra rollout.

Source: "Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling", 2025, arXiv 2507.01679v3, and the
released code (github.com/ZeroYuHuang/prefix_rft). With its symbols and, in brackets, our names:

    l ~ U(low_t, high)                    L = min(floor(l |y*|), |y*| - 1)        [prefix_ratio_*, `prefix_length`]
    low_t = end + (start - end) (1 + cos(pi t / T)) / 2                           [`ratio_low`], T = max_steps
    y^(N) = y*_{<L} + continuation ~ pi_old(. | x, y*_{<L})                       [`PrefixSampling`]
    A_i from the rewards of all N rows, one for forced and sampled tokens alike   [prefix_advantage="group"]
    forced tokens outside the top k of the entropies of forced tokens: no loss    [`EntropyMask`, entropy_quantile]
    ratio of every token, forced ones too: pi / pi_old, clipped as in PPO         [the trainer's; not pi / pi_off]

The released configuration also has the dual clip, `delta=3` in the trainer's options. prefix_advantage="reference" is
the advantage of the released code, where a row with a prefix is a group of its own: its continuation gets its bare
reward (never negative for rewards of 0 and 1), its prefix the reward minus the mean of the rows without a prefix.

What we changed, and why: prefixes are token ids and never travel through text, which may merge tokens at the cut. The
released code picks the entropies among the tokens of a micro-batch, so that its result depends on the micro-batch; we
pick among all tokens that were sampled together, over all processes, or within each row. Forced tokens that are left
out also leave the denominators of the loss, as with every mask; with loss_type="dr_grpo", the paper's, that is no
difference. A demonstration that does not fit into max_completion_length is refused: its row would always be cut off and
teach that the demonstration is wrong.

Be fair when comparing: arXiv 2604.23747 (2026) found the supervised baselines of this literature damaged by two bugs,
and supervised then reinforcement learning ahead once they were mended. Tree credit goes with prefix_advantage="group".

```python
import torch
from stemma.rl.prefix_rft import prefix_length, ratio_low, top_entropy

print(prefix_length(0.4, demonstration_length=50), ratio_low(step=100, total_steps=100))
# prints: 20 0.05
entropies = torch.tensor([[0.1, 2.0, 0.3, 0.2, 1.0]])  # of the forced tokens of a row
print(top_entropy(entropies, torch.ones(1, 5, dtype=torch.bool), quantile=0.2).tolist())
# prints: [[False, True, False, False, False]]
```
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.models.limits import vocabulary_size
from stemma.rl.engine.advantages import group_relative
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Generate, Need, Row, Run, end_token_ids, mean_of
from stemma.rl.engine.options import ScaleRewards, check_fields, require
from stemma.train.seeds import stream

__all__ = [
    "Config",
    "EntropyMask",
    "PrefixSampling",
    "check_demonstrations",
    "hooks",
    "prefix_length",
    "ratio_low",
    "reference_advantages",
    "reference_top_entropy",
    "top_entropy",
]


EntropyScope = Literal["batch", "row"]
PrefixAdvantage = Literal["group", "reference"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of continuing demonstrations."""

    needs: ClassVar[tuple[Need, ...]] = ("demonstrations",)

    num_prefixed_generations: int = 1
    """Completions of a group that begin with a piece of the demonstration, >= 1 and below num_generations."""
    prefix_ratio_low_start: float = 0.95
    """Lower bound of the share of the demonstration that is forced, at the first step, in [0, prefix_ratio_high]."""
    prefix_ratio_low_end: float = 0.05
    """The same at the last step, in [0, prefix_ratio_high]; half a cosine lies between."""
    prefix_ratio_high: float = 0.95
    """Upper bound of that share, in [0, 1]; the last token of a demonstration is never forced."""
    entropy_quantile: float = 0.2
    """Share of the forced tokens that is trained on, those with the highest entropy, in [0, 1]."""
    entropy_scope: EntropyScope = "batch"
    """Rank entropies among all forced tokens sampled together, or among those of each row."""
    prefix_advantage: PrefixAdvantage = "group"
    """Advantage of rows with a prefix: relative to the whole group, or that of the released code (reference)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "num_prefixed_generations", self.num_prefixed_generations >= 1, "at least 1")
        for name in ("prefix_ratio_high", "entropy_quantile"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("prefix_ratio_low_start", "prefix_ratio_low_end"):
            valid = 0 <= getattr(self, name) <= self.prefix_ratio_high
            require(self, name, valid, f"in [0, prefix_ratio_high={self.prefix_ratio_high}]")


def ratio_low(step: int, total_steps: int, *, start: float = 0.95, end: float = 0.05) -> float:
    """Lower bound of the prefix ratio: half a cosine from `start` at step 0 to `end` at `total_steps` and after."""
    progress = min(max(step / total_steps, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def prefix_length(ratio: float, demonstration_length: int) -> int:
    """Tokens to force: `floor(ratio * length)`, and never the last token of the demonstration."""
    # A product such as 0.29 * 100 lies below the integer it means.
    return max(min(math.floor(ratio * demonstration_length + 1e-9), demonstration_length - 1), 0)


def check_demonstrations(
    rows: Iterable[Row], *, vocab_size: int, eos_token_id: Collection[int], max_completion_length: int
) -> int:
    """Check the `demonstration_ids` of rows; call it on a data set before a run, the rollout repeats it on its rows.

    Args:
        rows: with or without `demonstration_ids` (token ids of one whole solution, with or without the end token).
        vocab_size: embeddings of the model.
        eos_token_id: ids that end a completion.
        max_completion_length: most tokens of a completion.

    Returns:
        The number of rows that have a demonstration.

    Raises:
        InvalidDataError: a demonstration with ids that are no integers or outside the vocabulary, with an end token
            before its end, or longer than a completion may be; or a row that has `prefix_ids` too.
    """
    count = 0
    for index, row in enumerate(rows):
        ids = row.get("demonstration_ids")
        if ids is None or len(ids) == 0:
            continue
        count += 1
        where = f"demonstration_ids of row {index} (prompt ends with ids {list(row['prompt_ids'])[-5:]})"
        wrong = next((x for x in ids if not _is_index(x) or not 0 <= int(x) < vocab_size), None)
        if wrong is not None:
            raise InvalidDataError(
                f"{where} contain {wrong!r}; the model's {vocab_size} tokens have the ids 0..{vocab_size - 1}. Encode "
                "demonstrations with the tokenizer of the model that is trained"
            )
        early = next((place for place, token in enumerate(ids[:-1]) if int(token) in eos_token_id), None)
        if early is not None:
            raise InvalidDataError(
                f"{where} have the end token {int(ids[early])} at position {early} of {len(ids)}; a demonstration is "
                "one completion, which ends with its only end token"
            )
        if len(ids) > max_completion_length:
            raise InvalidDataError(
                f"{where} are {len(ids)} tokens, more than max_completion_length={max_completion_length}, so that a "
                "continued prefix would be cut off. Raise max_completion_length or leave the demonstration out"
            )
        if row.get("prefix_ids"):
            raise InvalidDataError(
                f"row {index} has demonstration_ids and prefix_ids; sample a prefix of the demonstration, or put one "
                "into the prompt, not both"
            )
    return count


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


class PrefixSampling:
    """The rollout: the last `num_prefixed_generations` rows of a group begin with a piece of the demonstration.

    Each of them draws a ratio of its own. A row of the data set without `demonstration_ids`, or a prefix of no token
    (a demonstration of one token, say), gives a free sample instead.

    Args:
        config: see `Config`.
        total_steps: optimiser steps of the run, the T of the schedule.
        limits: as in `check_demonstrations`.
    """

    def __init__(self, config: Config, *, total_steps: int, **limits: Any) -> None:
        self.config, self.total_steps, self._limits = config, total_steps, limits

    def __call__(
        self, generate: Generate, rows: Sequence[Row], num_generations: int, seeds: Sequence[int], step: int
    ) -> RolloutBatch:
        """See `Rollout`.

        Raises:
            InvalidDataError, ValueError: see `check_demonstrations`; `num_generations` leaves no free sample.
        """
        prefixed = self.config.num_prefixed_generations
        if num_generations <= prefixed:
            raise ValueError(
                f"num_generations={num_generations} must exceed num_prefixed_generations={prefixed}: a group compares "
                "prefixed with free samples"
            )
        self.check(rows)
        lengths = self.lengths(rows, seeds, step)
        forced = [
            [[]] * (num_generations - prefixed)
            + [list(row["demonstration_ids"][:length]) if length else [] for length in own]
            for row, own in zip(rows, lengths, strict=True)
        ]
        return generate([list(row["prompt_ids"]) for row in rows], num_generations, seeds, forced=forced)

    def check(self, rows: Iterable[Row]) -> int:
        """`check_demonstrations` with the limits of this rollout; call it on a data set before a run."""
        return check_demonstrations(rows, **self._limits)

    def lengths(self, rows: Sequence[Row], seeds: Sequence[int], step: int) -> list[list[int]]:
        """Length in tokens of each prefix: `num_prefixed_generations` per row."""
        config = self.config
        low = ratio_low(step, self.total_steps, start=config.prefix_ratio_low_start, end=config.prefix_ratio_low_end)
        found = []
        for row, seed in zip(rows, seeds, strict=True):
            demonstration = row.get("demonstration_ids")
            size = 0 if demonstration is None else len(demonstration)
            draws = torch.rand(config.num_prefixed_generations, generator=stream(seed, "prefix-ratio"))
            ratios = (low + (config.prefix_ratio_high - low) * draws.double()).tolist()
            found.append([prefix_length(ratio, size) for ratio in ratios])
        return found

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Rewards with and without a prefix, mean prefix length in tokens (NaN where there is no such row)."""
        assert batch.reward is not None
        prefixed = batch.forced_len > 0
        return {
            "prefix_rft/reward_prefixed": mean_of(batch.reward[prefixed].tolist()),
            "prefix_rft/reward_free": mean_of(batch.reward[~prefixed].tolist()),
            "prefix_rft/prefix_length": mean_of(batch.forced_len[prefixed].tolist()),
        }


def reference_top_entropy(entropies: Tensor, candidates: Tensor, quantile: float, scope: EntropyScope) -> Tensor:
    """`top_entropy` written as loops: sort the candidates of each pool and take the first ones."""
    places = [(row, column) for row, column in candidates.nonzero().tolist()]
    rows = sorted({row for row, _ in places})
    pools = [places] if scope == "batch" else [[place for place in places if place[0] == row] for row in rows]
    keep = torch.zeros_like(candidates)
    for pool in pools:
        ranked = sorted(pool, key=lambda place: -round(float(entropies[place]) * 1e5))
        for place in ranked[: math.ceil(round(quantile * len(pool), 9))]:
            keep[place] = True
    return keep


def top_entropy(entropies: Tensor, candidates: Tensor, quantile: float, scope: EntropyScope = "batch") -> Tensor:
    """The candidates with the highest entropies: exactly `ceil(quantile * n)` of each pool of n candidates.

    Args:
        entropies: (N, T) in nats, compared to five decimals, because equal ones (one prefix in two rows) differ by
            rounding; of equal ones the first in row order is kept.
        candidates: (N, T) bool.
        quantile: in [0, 1].
        scope: one pool ("batch") or one per row ("row").

    Returns:
        (N, T) bool, within `candidates`.
    """
    row, column = candidates.nonzero(as_tuple=True)
    values = (entropies[row, column].double() * 1e5).round()
    pool = row if scope == "row" else torch.zeros_like(row)
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(pool[order], stable=True)]
    counts = torch.bincount(pool, minlength=1)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[pool[order]]
    quota = torch.tensor([math.ceil(round(quantile * n, 9)) for n in counts.tolist()], device=order.device)
    chosen = order[rank < quota[pool[order]]]
    return torch.zeros_like(candidates).index_put((row[chosen], column[chosen]), torch.tensor(True, device=row.device))


class EntropyMask:
    """The loss mask: sampled tokens, and the forced tokens about which the policy is most uncertain.

    Args:
        quantile: share of the forced tokens that is trained on; 0 freezes the prefixes, 1 trains on all of them.
        scope: "batch" ranks all forced tokens that were sampled together, over all processes; "row" those of each row.
        accelerator: of a run on several processes.
    """

    needs_entropies = True

    def __init__(self, quantile: float, scope: EntropyScope = "batch", accelerator: Any = None) -> None:
        self.quantile, self.scope, self.accelerator = quantile, scope, accelerator

    def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
        """(N, T) bool."""
        if batch.entropies is None:
            raise InvalidBatchError("the entropy mask got a batch without entropies; the trainer computes them for it")
        forced = batch.completion_mask & ~batch.sampled_mask
        if self.scope == "batch" and self.accelerator is not None and self.accelerator.num_processes > 1:
            return batch.sampled_mask | self._over_processes(batch.entropies, forced)
        return batch.sampled_mask | top_entropy(batch.entropies, forced, self.quantile, self.scope)

    def _over_processes(self, entropies: Tensor, forced: Tensor) -> Tensor:
        """`top_entropy` of one pool over the processes, in their order."""
        from accelerate.utils import gather_object

        own = entropies[forced]
        sizes = gather_object([len(own)])
        everyone = torch.tensor([value for values in gather_object([own.tolist()]) for value in values])[None]
        keep = top_entropy(everyone, torch.ones_like(everyone, dtype=torch.bool), self.quantile)[0]
        rank = self.accelerator.process_index
        mine = keep.split(sizes)[rank].to(forced.device)
        return torch.zeros_like(forced).masked_scatter(forced, mine)


def reference_advantages(
    rewards: Tensor,
    group_id: Tensor,
    forced_len: Tensor,
    num_columns: int,
    scale_rewards: ScaleRewards = "none",
) -> Tensor:
    """Advantages of the released code, where every row with a prefix is a group of its own.

    Args:
        rewards: (N,) float, NaN where unscorable.
        group_id: (N,) int.
        forced_len: (N,) int; 0 marks a free sample.
        num_columns: T.
        scale_rewards: "none" or "group", for the free samples.

    Returns:
        (N, T): free samples relative to the free samples of their group; a continuation its reward; a prefix its reward
        minus the mean reward of the free samples of the group. 0 where the reward, or that mean, is NaN.
    """
    free = forced_len == 0
    among_free = group_relative(torch.where(free, rewards, torch.nan), group_id, scale_rewards=scale_rewards)
    known = free & ~rewards.isnan()
    _, group = torch.unique(group_id, return_inverse=True)
    zeros = rewards.new_zeros(len(rewards))
    count = zeros.index_add(0, group, known.to(rewards.dtype))
    mean = zeros.index_add(0, group, torch.where(known, rewards, 0.0)) / count  # NaN without a known reward
    columns = torch.arange(num_columns, device=forced_len.device)
    sampled = torch.where(free, among_free, rewards)[:, None]
    advantages = torch.where(columns < forced_len[:, None], (rewards - mean[group])[:, None], sampled)
    return advantages.nan_to_num(nan=0.0)


class ReferenceCredit:
    """The credit of prefix_advantage="reference"; see `reference_advantages`."""

    def __init__(self, scale_rewards: ScaleRewards) -> None:
        self.scale_rewards = scale_rewards

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """(N, T) float32."""
        assert batch.reward is not None
        return reference_advantages(
            batch.reward, batch.group_id, batch.forced_len, batch.completion_ids.shape[1], self.scale_rewards
        ).float()


def hooks(config: Config, run: Run) -> dict[str, Any]:
    """What turns `stemma.rl.grpo.Trainer` into Prefix-RFT, as its keyword arguments.

    Raises:
        ValueError: a combination of options that is not supported.
        InvalidDataError: a row of the run has a demonstration that cannot be used; see `check_demonstrations`.
    """
    options = run.options
    free = options.num_generations - config.num_prefixed_generations
    needed = 2 if config.prefix_advantage == "reference" else 1
    if free < needed:
        raise ValueError(
            f"num_prefixed_generations={config.num_prefixed_generations} leaves {free} of num_generations="
            f"{options.num_generations} without a prefix; prefix_advantage={config.prefix_advantage!r} needs {needed}"
        )
    rollout = PrefixSampling(
        config,
        total_steps=options.max_steps,
        vocab_size=vocabulary_size(run.model),
        eos_token_id=end_token_ids(run.model, run.processing_class),
        max_completion_length=options.max_completion_length,
    )
    rollout.check(run.rows)
    mask = EntropyMask(config.entropy_quantile, config.entropy_scope, run.accelerator)
    found: dict[str, Any] = {"rollout": rollout, "loss_mask": mask}
    if config.prefix_advantage == "group":
        return found
    if run.credit is not None or options.credit != "grpo" or options.scale_rewards == "batch":
        raise ValueError(
            "prefix_advantage='reference' is a credit of its own: it needs credit='grpo' and scale_rewards 'group' "
            f"or 'none', got credit={run.credit or options.credit!r} and scale_rewards={options.scale_rewards!r}"
        )
    if options.importance_sampling_level == "sequence":
        raise ValueError(
            "prefix_advantage='reference' has two advantages in one row, which the one ratio of "
            "importance_sampling_level='sequence' would mix; use prefix_advantage='group' or level 'token'"
        )
    return {**found, "credit": ReferenceCredit(options.scale_rewards)}
