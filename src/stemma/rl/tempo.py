"""TEMPO: credit for the tokens at which the completions of a group part.

Use it to credit the tokens where a completion was won or lost, without a value network and without further samples. The
completions of a prompt make a prefix tree; the mean reward of the completions that begin with a prefix estimates the
value of that prefix. The step of this value from one token to the next is added to GRPO's advantage.

Source: "Exploiting Tree Structure for Credit Assignment in RL Training of LLMs", 2025, arXiv 2509.18314 (P2T and TEMPO;
no code was published). State `s_t` is the prompt with the first `t - 1` tokens of completion `i`:

| the paper | here |
|---|---|
| `D(s)`, descendants of a prefix | completions of the group through a node of `ValueTree.tree` |
| `V(s) = mean of r_j over D(s)` | `ValueTree.value`; `ValueTree.states` per token |
| `delta_t = V(s_{t+1}) - V(s_t)` | `ValueTree.differences`; not 0 only at the first token of a node |
| `A_t = ((r_i - mean r) + delta_t) / std r` | `tree_td_advantages`, with `tree_td_coef` before `delta_t` |

Where nothing branches, `A_t` is the advantage of GRPO to the last bit. The differences of a completion add up to the
value of its end less `mean r`, so that it is credited twice: once evenly, once at its branches. Over the completions
through a node they add up to zero. Behind the last branch a value is the one reward itself, with its noise, so the
method needs completions that share much, which `ValueTree.metrics` measures.

What we changed: the coefficient; the unbiased standard deviation plus 1e-4 (the paper does not say which), the one of
GRPO here; an unscorable (NaN) reward leaves every mean alone and its completion gets 0. The end token is a token like
others: a completion that was cut off may be the beginning of another, and then ends in an inner node. Two groups share
nothing, even with equal tokens.

Relations: the tree is a second one beside that of the forward pass. That one holds the prompts, joins no runs below 8
tokens, where a node costs more than it saves, and is built per micro-batch, after credit; here a single shared token
counts. Building it takes a few milliseconds where sampling took seconds. Monte Carlo methods (VinePPO, TreeRPO) sample
further completions to estimate the same values; GAE learns them.

```python
import torch
from stemma.rl.tempo import tree_td_advantages

completions = torch.tensor([[5, 1], [5, 2], [6, 1], [6, 2]])  # one group; those that begin with 5 are mostly right
rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
mask, group = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
advantages = tree_td_advantages(rewards, completions, mask, group, scale_rewards="none")
print(advantages.tolist())  # a row per completion, a column per token
# prints: [[0.5, 0.25], [0.5, 0.25], [0.0, 0.75], [-1.0, -1.25]]
```
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stemma.prefix.values import ValueTree, reference_states
from stemma.rl.engine.advantages import GroupCredit, group_relative, leave_one_out, reward_scale
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import Run
from stemma.rl.engine.options import CreditName, ScaleRewards, check_fields, require

__all__ = ["Config", "TreeCredit", "ValueTree", "hooks", "reference_states", "tree_td_advantages"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of tree credit."""

    tree_td_coef: float = 1.0
    """Weight of the temporal difference at the branches of a group's prefix tree, >= 0; 0: GRPO. TEMPO: 1."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "tree_td_coef", self.tree_td_coef >= 0, "at least 0")


def tree_td_advantages(
    rewards: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    group_id: Tensor,
    *,
    estimator: CreditName = "grpo",
    scale_rewards: ScaleRewards = "group",
    coefficient: float = 1.0,
    all_rewards: Tensor | None = None,
) -> Tensor:
    """Group-relative advantages plus the temporal differences of the prefix tree, on the same scale.

    Args:
        rewards, completion_ids, completion_mask, group_id: see `ValueTree.build`.
        estimator: "grpo" subtracts the mean of the group, "rloo" that of the others (and divides nothing).
        scale_rewards: see `stemma.rl.engine.advantages.group_relative`.
        coefficient: weight of the differences, at least 0; with 0 every column is the group-relative advantage.
        all_rewards: see `stemma.rl.engine.advantages.group_relative`.

    Returns:
        (N, T) advantages in the dtype of `rewards`; columns of the padding hold the group-relative advantage.

    Raises:
        InvalidBatchError: see `ValueTree.build`.
    """
    Config(tree_td_coef=coefficient)
    values = ValueTree.build(rewards, completion_ids, completion_mask, group_id)
    if estimator == "rloo":
        base, scale = leave_one_out(rewards, group_id), torch.ones_like(rewards)
    else:
        base = group_relative(rewards, group_id, scale_rewards=scale_rewards, all_rewards=all_rewards)
        scale = reward_scale(rewards, group_id, scale_rewards=scale_rewards, all_rewards=all_rewards)
    differences = torch.from_numpy(values.differences()).to(rewards)
    return base[:, None] + coefficient * differences / scale[:, None]


@dataclass(frozen=True, kw_only=True)
class TreeCredit(GroupCredit):
    """`tree_td_advantages` as the credit of a trainer; other fields are those of `GroupCredit`."""

    coefficient: float = 1.0
    """Weight of the temporal differences; see `Config.tree_td_coef`."""

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """(N, T) float32 advantages of a batch whose rewards are known."""
        assert batch.reward is not None
        return tree_td_advantages(
            batch.reward,
            batch.completion_ids,
            batch.completion_mask,
            batch.group_id,
            estimator=self.estimator,
            scale_rewards=self.scale_rewards,
            coefficient=self.coefficient,
            all_rewards=self.all_rewards(batch),
        ).float()

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """What to log about the trees of the batch; see `ValueTree.metrics`."""
        assert batch.reward is not None
        values = ValueTree.build(batch.reward, batch.completion_ids, batch.completion_mask, batch.group_id)
        return values.metrics()


def hooks(config: Config, run: Run) -> dict[str, Any]:
    """What turns `stemma.rl.grpo.Trainer` into TEMPO, as its keyword arguments: the credit.

    Args:
        config: see `Config`.
        run: the run that it joins. With `importance_sampling_level="sequence"` a token keeps its own advantage
            (GSPO-token).
    """
    credit = TreeCredit(
        estimator=run.options.credit,
        scale_rewards=run.options.scale_rewards,
        accelerator=run.accelerator,
        coefficient=config.tree_td_coef,
    )
    return {"credit": credit}
