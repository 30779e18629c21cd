"""PPPO: train only on the beginning of each output, judged by several continuations; a beginning that grows.

Use it for models whose early tokens decide the outcome while the rest follows by itself ("beginning lock-in": P(correct
| the beginning of a correct output) > P(correct) > P(correct | that of a wrong one); `beginning_lock_in` measures it on
your model). Few tokens are optimised and their reward is steadier, at the price of `1 + num_continuations` samples
each.

Source: "Well Begun, Half Done: Reinforcement Learning with Prefix Optimization for LLM Reasoning", 2025, arXiv
2512.15274 (AAAI 2026; no code). With its symbols and, in brackets, our names:

    o_1..o_N ~ pi_old(. | q)            b_i = first floor(eta |o_i|) tokens of o_i        [`PrefixRetention`]
    c_i,1..c_i,G ~ pi_old(. | q, b_i)                                                     [num_continuations]
    R_i = r(o_i) + sum_j r(c_ij)        A_i = (R_i - mean R) / std R                      [`AccumulatedCredit`]
    J = 1 / sum_k |o_k|  sum_i sum_{t <= |b_i|} min(rho A_i, clip(rho, .8, 1.28) A_i)     [`RetainedMask`]
    eta = .15, and .05 more whenever evaluation did not improve, up to .35                [eta_start, _step, _max]

The clip range is `epsilon=0.2, epsilon_high=0.28` in the trainer's options, N its num_generations (paper: 8).

What we changed, and why: at least one token is retained. An output whose beginning is the whole output has nothing to
continue; its continuations are empty and count with the output's own reward. Where some of the 1 + G rewards of a
beginning cannot be scored, R_i is 1 + G times the mean of the others, so that rows stay comparable; without any it is
unscorable too. The training forward ends behind the last retained token, which changes no number. A stall is an
evaluation without a new best; the paper does not say how it counts. It feeds evaluation back into training: evaluate on
problems that the final figure does not use.

Problem, beginnings, continuations are a prefix tree of three levels; sampling encodes the problem once. Relations: tree
credit may be the wrapped credit. Rows with forced tokens are refused, for their beginning was not sampled.

```python
import torch
from stemma.rl.pppo import accumulated_reward, retained_lengths

print(retained_lengths(torch.tensor([40, 100]), eta=0.15).tolist())  # tokens of each output that are trained on
# prints: [6, 15]
outputs, continuations = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
print(accumulated_reward(outputs, continuations, torch.tensor([0, 0, 0, 1, 1, 1]), num_continuations=3).tolist())
# prints: [3.0, 1.0]
```
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stemma.errors import InvalidBatchError
from stemma.rl.engine.advantages import GroupCredit
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Credit, Generate, Need, Reward, Row, Run
from stemma.rl.engine.options import check_fields, require
from stemma.rl.engine.rewards import score_completions
from stemma.train.seeds import stream_seed

__all__ = [
    "AccumulatedCredit",
    "Config",
    "LockIn",
    "PrefixRetention",
    "RetainedMask",
    "accumulated_reward",
    "beginning_lock_in",
    "continue_beginnings",
    "hooks",
    "reference_accumulated_reward",
    "retained_lengths",
]


Normalizer = Literal["all", "kept"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of progressive prefix-token policy optimisation."""

    defaults: ClassVar[Mapping[str, Any]] = {"eval_steps": 10}
    """What the run does where nothing is said: the share grows after evaluations."""

    eta_start: float = 0.15
    """Share of each output, from its beginning, that is trained on at first, in (0, 1]."""
    eta_max: float = 0.35
    """The most it grows to, in [eta_start, 1]."""
    eta_step: float = 0.05
    """What it grows by when evaluation stalls, >= 0; 0 keeps it fixed."""
    eta_patience: int = 1
    """Evaluations in a row without a new best eval/reward before it grows, >= 1."""
    num_continuations: int = 8
    """Continuations of each retained beginning that judge it beside the output itself, >= 0."""
    normalizer: Normalizer = "all"
    """Tokens that the loss is divided by: all of the outputs (paper), or the retained ones (kept)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "eta_start", 0 < self.eta_start <= 1, "in (0, 1]")
        require(self, "eta_max", self.eta_start <= self.eta_max <= 1, f"in [eta_start={self.eta_start}, 1]")
        require(self, "eta_step", self.eta_step >= 0, "at least 0")
        require(self, "eta_patience", self.eta_patience >= 1, "at least 1")
        require(self, "num_continuations", self.num_continuations >= 0, "at least 0")

    @property
    def needs(self) -> tuple[Need, ...]:
        """Evaluations while it trains, where the share may grow."""
        return ("evaluation",) if self.eta_step else ()


def retained_lengths(lengths: Tensor, eta: float) -> Tensor:
    """Tokens retained of outputs of the given lengths (N,): `floor(eta * length)`, at least one where there is one.

    Raises:
        ValueError: `eta` outside (0, 1].
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], the share of an output that is retained; got {eta}")
    # A product such as 0.29 * 100 lies below the integer it means.
    share = (eta * lengths.double() + 1e-9).floor().long()
    return torch.minimum(share.clamp(min=1), lengths)


def continue_beginnings(
    generate: Generate, batch: RolloutBatch, retained_len: Tensor, num_continuations: int, seeds: Sequence[int]
) -> RolloutBatch | None:
    """Sample continuations of the first `retained_len` (N,) tokens of each row; `seeds` are those of its prompts.

    Returns:
        A batch whose `group_id` is the row of `batch` that is continued; rows that are retained whole have no
        continuation. None for no continuations at all.
    """
    if not num_continuations:
        return None
    lengths = batch.completion_mask.sum(-1)
    open_rows = (retained_len < lengths).nonzero().squeeze(1).tolist()
    group = batch.group_id.tolist()
    prompts = [batch.prompt_ids[g] for g in group]
    if not open_rows:
        return replace(batch.select([]), prompt_ids=prompts, encoded_tokens=0)
    row_seeds = [stream_seed(seeds[group[row]], "continuations", row - group.index(group[row])) for row in open_rows]
    begun = zip(batch.completion_ids[open_rows].tolist(), retained_len[open_rows].tolist(), strict=True)
    forced = [[ids[:length]] * num_continuations for ids, length in begun]
    sampled = generate([prompts[row] for row in open_rows], num_continuations, row_seeds, forced=forced)
    return replace(sampled, prompt_ids=prompts, group_id=torch.tensor(open_rows)[sampled.group_id])


class PrefixRetention:
    """The rollout: outputs, how much of each is retained, and continuations of what is retained.

    The retained share `eta` grows by `eta_step` after `eta_patience` evaluations in a row without a new best
    `eval/reward`, up to `eta_max`; an evaluation that could score nothing (NaN) does not count.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._raised, self._best, self._stalled = 0, -math.inf, 0

    @property
    def eta(self) -> float:
        """Share of each output that is retained now."""
        return min(self.config.eta_start + self._raised * self.config.eta_step, self.config.eta_max)

    def __call__(
        self, generate: Generate, rows: Sequence[Row], num_generations: int, seeds: Sequence[int], step: int
    ) -> RolloutBatch:
        """See `Rollout`."""
        batch = generate([list(row["prompt_ids"]) for row in rows], num_generations, seeds)
        kept = retained_lengths(batch.completion_mask.sum(-1), self.eta)
        continuations = continue_beginnings(generate, batch, kept, self.config.num_continuations, seeds)
        further = {} if continuations is None else {"continuations": continuations}
        return replace(batch, extras={"retained_len": kept, **further})

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""
        value = metrics["eval/reward"]
        if math.isnan(value):
            return
        if value > self._best:
            self._best, self._stalled = value, 0
            return
        self._stalled += 1
        if self._stalled >= self.config.eta_patience:
            self._stalled = 0
            if self.eta < self.config.eta_max:
                self._raised += 1

    def state_dict(self) -> dict[str, Any]:
        """Where eta stands."""
        return {"raised": self._raised, "best": self._best, "stalled": self._stalled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._raised, self._best, self._stalled = state["raised"], state["best"], state["stalled"]

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Eta and the share of sampled outputs' tokens that is retained."""
        share = _retained(batch).sum() / batch.completion_mask.sum()
        return {"pppo/eta": self.eta, "pppo/retained_fraction": share.item()}


def _retained(batch: RolloutBatch) -> Tensor:
    """(N,) int64: leading completion tokens that are trained on."""
    kept = batch.extras.get("retained_len")
    if not isinstance(kept, Tensor):
        raise InvalidBatchError("the batch does not say what is retained of it; PPPO's mask needs PPPO's rollout")
    return kept


class RetainedMask:
    """The loss mask: the retained beginning of every output.

    Args:
        normalizer: "all" divides the loss by the tokens of whole outputs, "kept" by those of the beginnings.
    """

    def __init__(self, normalizer: Normalizer = "all") -> None:
        self.normalizer = normalizer

    def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
        """(N, T) bool.

        Raises:
            InvalidBatchError: a batch that `PrefixRetention` did not make, or with forced tokens.
        """
        kept = _retained(batch)
        if (batch.forced_len > 0).any():
            raise InvalidBatchError(
                f"{int((batch.forced_len > 0).sum())} rows have a forced beginning; PPPO trains on the beginnings of "
                "outputs, which must have been sampled. Do not combine it with demonstration prefixes"
            )
        columns = torch.arange(batch.completion_ids.shape[1], device=batch.completion_ids.device)
        return batch.completion_mask & (columns < kept[:, None])

    def normaliser(self, batch: RolloutBatch) -> Tensor:
        """(N, T) bool: the tokens that the denominators of the loss count."""
        return batch.completion_mask if self.normalizer == "all" else self(batch, 0)


def reference_accumulated_reward(
    reward: Tensor, continuation_reward: Tensor, row: Tensor, num_continuations: int
) -> Tensor:
    """`accumulated_reward` written as a loop over outputs."""
    totals = []
    for index, own in enumerate(reward.tolist()):
        others = continuation_reward[row == index].tolist() or [own] * num_continuations
        known = [value for value in (own, *others) if not math.isnan(value)]
        totals.append(sum(known) / len(known) * (num_continuations + 1) if known else math.nan)
    return torch.tensor(totals, dtype=reward.dtype)


def accumulated_reward(reward: Tensor, continuation_reward: Tensor, row: Tensor, num_continuations: int) -> Tensor:
    """Continuation accumulated reward `R_i = r_i + sum_j r(c_ij)`.

    Args:
        reward: (N,) float, of the outputs; NaN where unscorable.
        continuation_reward: (M,) float, of the continuations; NaN where unscorable.
        row: (M,) int, the output whose beginning each of them continues.
        num_continuations: C.

    Returns:
        (N,): `1 + C` times the mean of the scorable rewards of output and continuations, which is their sum when all
        are there; NaN when none is. An output without continuations counts as its own.
    """
    values, index = torch.cat([reward, continuation_reward]), torch.cat([torch.arange(len(reward)), row])
    known = ~values.isnan()
    zeros = torch.zeros_like(reward)
    count = zeros.index_add(0, index, known.to(reward.dtype))
    total = zeros.index_add(0, index, torch.where(known, values, 0.0))
    return total * ((num_continuations + 1) / count.clamp(min=1)) + torch.where(count > 0, 0.0, torch.nan)


class AccumulatedCredit:
    """The credit: another credit, on accumulated rewards instead of the outputs' own."""

    def __init__(self, credit: Credit, num_continuations: int) -> None:
        self.credit, self.num_continuations = credit, num_continuations

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """(N,) or (N, T), as the wrapped credit has it."""
        return self.credit(self._accumulated(batch))

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """The mean accumulated reward per sample (comparable with `reward`), and what the wrapped credit logs."""
        accumulated = self._accumulated(batch)
        assert accumulated.reward is not None
        mean = accumulated.reward.nanmean().item() / (self.num_continuations + 1)
        inner: Callable[[RolloutBatch], dict[str, float]] | None = getattr(self.credit, "metrics", None)
        return {"pppo/reward_accumulated": mean} | (inner(accumulated) if inner else {})

    def _accumulated(self, batch: RolloutBatch) -> RolloutBatch:
        assert batch.reward is not None
        others = batch.extras.get("continuations")
        rewards, rows = batch.reward[:0], batch.group_id[:0]
        if isinstance(others, RolloutBatch):
            assert others.reward is not None
            rewards, rows = others.reward, others.group_id
        total = accumulated_reward(batch.reward, rewards, rows, self.num_continuations)
        return replace(batch, reward=total, extras={})


@dataclass(frozen=True)
class LockIn:
    """Chances of success over problems that have correct and wrong outputs; each problem weighs the same."""

    fraction: float
    """Share of an output that was kept."""
    correct: float
    """P(correct), of samples that did not choose the problems or the beginnings."""
    after_correct: float
    """P(correct | beginning of a correct output)."""
    after_wrong: float
    """P(correct | beginning of a wrong output)."""
    standard_errors: tuple[float, float, float]
    """Of `correct`, `after_correct` and `after_wrong`, over problems; NaN for fewer than two."""
    num_problems: int
    """Problems with outputs of both kinds; with none of them every probability is NaN."""
    of_problems: tuple[tuple[float, float, float], ...]
    """The three chances of each such problem; NaN where none of its completions could be scored."""


def beginning_lock_in(
    generate: Generate,
    rows: Sequence[Row],
    reward_func: Reward,
    decode: Callable[[list[int]], str],
    *,
    fractions: Sequence[float] = (0.15, 0.3),
    num_outputs: int = 8,
    num_continuations: int = 8,
    seed: int = 0,
    threshold: float = 0.5,
) -> list[LockIn]:
    """Measure how much the beginning of an output decides.

    Averages are within problems first: an average over outputs would call it lock-in that the beginnings of correct
    outputs come from easier problems.

    Args:
        generate: sampling; `functools.partial(sample, model, generator, max_completion_length)` makes one.
        rows: the problems.
        reward_func: the verifier; a completion is correct above `threshold` and left out where it cannot be scored.
        decode: token ids to text, for the verifier.
        fractions: shares of an output, in (0, 1].
        num_outputs: outputs per problem.
        num_continuations: continuations of each beginning.
        seed: of everything sampled here.
    """

    def correct(batch: RolloutBatch, asked: Sequence[Row]) -> Tensor:
        values = score_completions([reward_func], asked, batch, decode)[0]
        scores = [math.nan if value is None else float(value > threshold) for value in values]
        return torch.tensor(scores, dtype=torch.float64)

    prompts = [list(row["prompt_ids"]) for row in rows]
    seeds = {use: [stream_seed(seed, use, index) for index in range(len(rows))] for use in ("outputs", "fresh")}
    outputs = generate(prompts, num_outputs, seeds["outputs"])
    outcome = correct(outputs, rows)
    fresh = generate(prompts, num_outputs, seeds["fresh"])
    fresh_outcome = correct(fresh, rows)
    group = outputs.group_id
    mixed = [g for g in range(len(rows)) if {0.0, 1.0} <= set(outcome[group == g].tolist())]
    plain = [fresh_outcome[fresh.group_id == g].nanmean().item() for g in mixed]
    found = []
    for fraction in fractions:
        kept = retained_lengths(outputs.completion_mask.sum(-1), fraction)
        again_seeds = [stream_seed(seed, "continuations", str(fraction), index) for index in range(len(rows))]
        continued = continue_beginnings(generate, outputs, kept, num_continuations, again_seeds)
        chance = outcome.clone()  # of an output that was kept whole
        if continued is not None:
            again = correct(continued, [rows[g] for g in group.tolist()])
            for row in continued.group_id.unique().tolist():
                chance[row] = again[continued.group_id == row].nanmean()
        good, bad = ([chance[(group == g) & (outcome == kind)].nanmean().item() for g in mixed] for kind in (1.0, 0.0))
        (base, error), (high, high_error), (low, low_error) = map(_mean_and_error, (plain, good, bad))
        of_problems = tuple(zip(plain, good, bad, strict=True))
        found.append(LockIn(fraction, base, high, low, (error, high_error, low_error), len(mixed), of_problems))
    return found


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    error = known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return (known.mean().item() if len(known) else math.nan), error


def hooks(config: Config, run: Run) -> dict[str, Any]:
    """What turns `stemma.rl.grpo.Trainer` into PPPO, as its keyword arguments. Its credit builds on that of the run."""
    options = run.options
    inner = run.credit or GroupCredit(
        estimator=options.credit, scale_rewards=options.scale_rewards, accelerator=run.accelerator
    )
    return {
        "rollout": PrefixRetention(config),
        "credit": AccumulatedCredit(inner, config.num_continuations),
        "loss_mask": RetainedMask(config.normalizer),
    }
