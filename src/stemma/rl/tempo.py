"""TEMPO: credit for the tokens at which the completions of a group part.

For whom wants to know *where* a completion was won or lost without a value network and without further samples. The
completions of a prompt make a prefix tree; the mean reward of the completions that begin with a prefix estimates the
value of that prefix. The step of this value from one token to the next is added to GRPO's advantage.

Source: "Exploiting Tree Structure for Credit Assignment in RL Training of LLMs", 2025, arXiv 2509.18314 (P2T and TEMPO;
no code was published). State ``s_t`` is the prompt with the first ``t - 1`` tokens of completion ``i``:

====================================================  ==================================================================
the paper                                             here
====================================================  ==================================================================
``D(s)``, descendants of a prefix                     completions of the group through a node of `ValueTree.tree`
``V(s) = mean of r_j over D(s)``                      `ValueTree.value`; `ValueTree.states` per token
``delta_t = V(s_{t+1}) - V(s_t)``                     `ValueTree.differences`; not 0 only at the first token of a node
``A_t = ((r_i - mean r) + delta_t) / std r``          `tree_td_advantages`, with `tree_td_coef` before ``delta_t``
====================================================  ==================================================================

Where nothing branches, ``A_t`` is the advantage of GRPO to the last bit. The differences of a completion add up to
``V(its end) - mean r``, so that it is credited twice: once evenly, once at its branches. Over the completions through a
node they add up to zero. Behind the last branch a value is the one reward itself, noise and all: the method lives on
completions that share much, which `ValueTree.metrics` measures.

What we changed: the coefficient; the unbiased standard deviation plus 1e-4 (the paper does not say which), the one of
GRPO here; an unscorable (NaN) reward leaves every mean alone and its completion gets 0. The end token is a token like
others: a completion that was cut off may be the beginning of another, and then ends in an inner node. Two groups share
nothing, even with equal tokens.

Relations: the tree is a second one beside that of the forward pass. That one holds the prompts, joins no runs below 8
tokens, where a node costs more than it saves, and is built per micro-batch, after credit; here a single shared token
counts. Building it takes a few milliseconds where sampling took seconds. Monte Carlo methods (VinePPO, TreeRPO) sample
further completions to estimate the same values; GAE learns them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stemma.errors import InvalidBatchError
from stemma.prefix.radix import as_matrix, ranges
from stemma.prefix.tree import PrefixTree
from stemma.rl._config import Config as TrainerConfig
from stemma.rl._config import CreditName, ScaleRewards
from stemma.rl._config import TempoConfig as Config
from stemma.rl._credit import GroupCredit
from stemma.rl._losses import group_relative, leave_one_out, reward_scale
from stemma.rl._shared import RolloutBatch

__all__ = ["Config", "TreeCredit", "ValueTree", "reference_states", "seams", "tree_td_advantages"]


def reference_states(rewards: Tensor, completion_ids: Tensor, completion_mask: Tensor, group_id: Tensor) -> Tensor:
    """`ValueTree.states` by comparing every prefix with every completion: O(N^2 T^2), for tests."""
    ids, lengths = completion_ids.tolist(), completion_mask.sum(-1).tolist()
    states = torch.empty(len(ids), completion_ids.shape[1] + 1, dtype=torch.float64)
    for row, length in enumerate(lengths):
        for column in range(states.shape[1]):
            prefix = ids[row][: min(column, length)]
            descendants = [
                rewards[other].double()
                for other in range(len(ids))
                if group_id[other] == group_id[row]
                and lengths[other] >= len(prefix)
                and ids[other][: len(prefix)] == prefix
                and not rewards[other].isnan()
            ]
            states[row, column] = torch.stack(descendants).mean() if descendants else torch.nan
    return states


@dataclass(frozen=True, eq=False)
class ValueTree:
    """The prefix tree of the completions of some groups, with the mean reward of every node (P2T)."""

    tree: PrefixTree
    """Sequence `i` is completion `i` behind one pseudo token, the number of its group; every shared token is a node."""
    value: np.ndarray
    """(R,) float64: mean reward of the completions through each node; NaN where none of them has one."""
    scored: np.ndarray
    """(N,) bool: completions with a reward."""
    num_columns: int
    """T, the padded completion length."""

    @classmethod
    def build(cls, rewards: Tensor, completion_ids: Tensor, completion_mask: Tensor, group_id: Tensor) -> "ValueTree":
        """Build the tree of every group.

        Args:
            rewards: (N,) float, NaN where unscorable.
            completion_ids: (N, T) int, right-padded; what stands in the padding does not matter.
            completion_mask: (N, T), true on real tokens.
            group_id: (N,) int, equal within a group, in any order.

        Raises:
            InvalidBatchError: shapes that do not fit, a mask with holes, or a group with a single completion.
        """
        ids, mask = as_matrix(completion_ids, "completion_ids"), as_matrix(completion_mask, "completion_mask")
        size, length = ids.shape
        shapes = (mask.shape, tuple(rewards.shape), tuple(group_id.shape))
        if shapes != ((size, length), (size,), (size,)):
            raise InvalidBatchError(
                f"completion_mask, rewards and group_id have shapes {', '.join(map(str, shapes))}; completion_ids of "
                f"shape {ids.shape} needs {(size, length)}, {(size,)} and {(size,)}"
            )
        lengths = mask.astype(bool).sum(1)
        if not np.array_equal(mask.astype(bool), np.arange(length) < lengths[:, None]):
            raise InvalidBatchError("completion_mask has a hole; completions are right-padded")
        names, group, members = np.unique(group_id.cpu().numpy(), return_inverse=True, return_counts=True)
        if members.min() < 2:
            raise InvalidBatchError(
                f"group {names[members.argmin()]} has one completion, and tree credit compares completions of a "
                "prompt; sample num_generations >= 2"
            )
        headed = np.concatenate([group[:, None], ids], axis=1)
        rows = [row[: count + 1] for row, count in zip(headed, lengths, strict=True)]
        tree = PrefixTree.from_sequences(rows, min_shared=1)

        reward = rewards.detach().double().cpu().numpy()
        scored = ~np.isnan(reward)
        # Node by node rather than by differences of running sums: other groups do not leave their rounding here.
        through = tree.node_last - tree.node_first
        of_node = tree.order[ranges(tree.node_first, through)]
        begin = np.cumsum(through) - through
        count = np.add.reduceat(scored[of_node].astype(np.int64), begin)
        total = np.add.reduceat(np.where(scored, reward, 0.0)[of_node], begin)
        low = np.minimum.reduceat(np.where(scored, reward, np.inf)[of_node], begin)
        high = np.maximum.reduceat(np.where(scored, reward, -np.inf)[of_node], begin)
        # Between the least and the greatest, so that equal rewards have exactly themselves as mean.
        mean = np.clip(total / np.maximum(count, 1), low, high)
        return cls(tree, np.where(count > 0, mean, np.nan), scored, length)

    def states(self) -> np.ndarray:
        """(N, T + 1) float64: column `t` is the value of the first `t` tokens; behind its end, that of the whole."""
        tree = self.tree
        node_of = np.repeat(np.arange(tree.num_nodes), tree.node_length)
        columns = np.minimum(np.arange(self.num_columns + 1), tree.lengths[:, None] - 1)
        return self.value[node_of[tree.path[tree.offsets[:-1, None] + columns]]]

    def differences(self) -> np.ndarray:
        """(N, T) float64: ``V(s_{t+1}) - V(s_t)`` of every token; 0 in the padding and in rows without a reward."""
        return np.where(self.scored[:, None], np.diff(self.states(), axis=1), 0.0)

    def metrics(self) -> dict[str, float]:
        """What the method has to work with.

        Returns:
            `tree/branch_frac`: share of the tokens with a difference other than 0; `tree/mean_shared_depth`: first
            tokens of a completion that another one shares, mean over completions; `tree/mean_descendants_at_branch`:
            completions through a prefix behind which they part, mean over these prefixes (0 when there is none).
        """
        tree = self.tree
        through = tree.node_last - tree.node_first
        tokens = tree.total_tokens - tree.num_sequences
        own = tree.node_length - (tree.node_depth == 0)  # without the pseudo token
        branching = np.unique(tree.node_parent[tree.node_parent >= 0])
        return {
            "tree/branch_frac": float(np.count_nonzero(self.differences())) / max(tokens, 1),
            "tree/mean_shared_depth": float((own * through)[through > 1].sum()) / tree.num_sequences,
            "tree/mean_descendants_at_branch": float(through[branching].mean()) if branching.size else 0.0,
        }


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
        scale_rewards: see `_losses.group_relative`.
        coefficient: weight of the differences, at least 0; with 0 every column is the group-relative advantage.
        all_rewards: see `_losses.group_relative`.

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


def seams(config: Config, trainer: TrainerConfig, *, accelerator: Any = None) -> dict[str, TreeCredit]:
    """What turns `stemma.rl.grpo.Trainer` into TEMPO, as its keyword arguments: the credit.

    Args:
        config: see `Config`.
        trainer: the options of the trainer.
        accelerator: of a run on several processes.

    Raises:
        ValueError: `importance_sampling_level="sequence"`.
    """
    if trainer.importance_sampling_level == "sequence":
        raise ValueError(
            "importance_sampling_level must be token for tree credit; got 'sequence', whose one ratio per completion "
            "spreads the credit of a token over all of them"
        )
    credit = TreeCredit(
        estimator=trainer.credit,
        scale_rewards=trainer.scale_rewards,
        accelerator=accelerator,
        coefficient=config.tree_td_coef,
    )
    return {"credit": credit}
