"""One training step, forward and backward, of the same loss by every method, on the same unmodified model class.

A method is a pair of functions: `prepare(model)` once, then `step(model, workload)`, which goes from token lists to
accumulated parameter gradients and returns the detached log-probabilities of the scored tokens, row by row. All work a
training step needs is inside `step`: padding, packing, masks, building the prefix tree.

Every baseline is given what it can use: it scores only the response tokens (`logits_to_keep`), the padded batch is
padded on the right, where a causal model needs no padding mask, so that PyTorch's fused causal kernel runs, and
log-probabilities come from the fastest formulation PyTorch has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import prefix_grouper_adapter
from benchmarks.workloads import Workload, pad_right

Step = Callable[[Any, Workload], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A way to compute the workload's loss and gradients.

    `missing()` names what has to be installed, or is None.
    """

    name: str
    label: str
    prepare: Callable[[Any], None]
    step: Step
    missing: Callable[[], str | None] = lambda: None


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target under logits of shape (..., V)."""
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return -loss.view(targets.shape)


def finish(workload: Workload, logprobs_S: torch.Tensor) -> torch.Tensor:
    """Backward of the workload's loss; the log-probabilities detached."""
    workload.loss(logprobs_S).backward()
    return logprobs_S.detach()


def flat_targets(workload: Workload) -> torch.Tensor:
    """(S,) int64: the scored token ids, row by row."""
    return torch.tensor([token for group in workload.responses for response in group for token in response])


# -------------------- Hugging Face baselines


def use_sdpa(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def each_row_alone(model: Any, workload: Workload) -> torch.Tensor:
    """The definition of correct: one unpadded forward and backward per sequence, gradients summed."""
    pieces, start = [], 0
    for row, prompt_tokens in zip(workload.rows, workload.prompt_lengths):
        ids = torch.tensor([row])
        keep = torch.arange(prompt_tokens - 1, len(row) - 1)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        logprobs = token_logprobs(logits[0], ids[0, prompt_tokens:])
        weights = workload.flat_weights[start : start + len(logprobs)].to(logprobs)
        ((logprobs * weights).sum() / workload.scored_tokens).backward()
        pieces.append(logprobs.detach())
        start += len(logprobs)
    return torch.cat(pieces)


def hf_padded(model: Any, workload: Workload) -> torch.Tensor:
    """One right-padded batch: what trainers do today, at its fairest."""
    ids = pad_right(workload.rows)
    first = min(workload.prompt_lengths)
    keep = torch.arange(first - 1, ids.shape[1] - 1)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    logprobs = token_logprobs(logits, ids[:, first:])
    column = torch.arange(first, ids.shape[1])
    starts = torch.tensor(workload.prompt_lengths)[:, None]
    ends = starts + torch.tensor(workload.response_lengths)[:, None]
    return finish(workload, logprobs[(column >= starts) & (column < ends)])


def hf_packed(model: Any, workload: Workload) -> torch.Tensor:
    """All sequences in one row, told apart by `position_ids`: SDPA then takes a dense tokens × tokens mask."""
    ids = torch.tensor([[token for row in workload.rows for token in row]])
    lengths = torch.tensor([len(row) for row in workload.rows])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = lengths.cumsum(0).tolist()
    keep = torch.cat([torch.arange(end - r - 1, end - 1) for end, r in zip(ends, workload.response_lengths)])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
    return finish(workload, token_logprobs(logits[0], flat_targets(workload)))


# -------------------- naive dense-mask tree


@dataclass
class TokenTrie:
    """The obvious trie, one node per token, laid out depth first; slow and independent of the library's tree."""

    tokens: list[int]
    depths: list[int]
    subtree_ends: list[int]
    predictors: list[int]
    """Packed index of the token before each scored token, row by row."""

    @classmethod
    def build(cls, workload: Workload) -> TokenTrie:
        children: list[dict[int, int]] = [{}]  # node 0 is the empty root
        paths = []
        for row in workload.rows:
            node, path = 0, []
            for token in row:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
                path.append(node)
            paths.append(path)
        tokens, depths, ends, place = [], [], [], {}
        stack = [(token, node, 0) for token, node in reversed(children[0].items())]
        while stack:
            token, node, depth = stack.pop()
            if depth < 0:  # second visit: everything below has been laid out
                ends[place[node]] = len(tokens)
                continue
            place[node] = len(tokens)
            tokens.append(token)
            depths.append(depth)
            ends.append(0)
            stack.append((token, node, -1))
            stack.extend((t, child, depth + 1) for t, child in reversed(children[node].items()))
        predictors = [
            place[path[index]]
            for path, prompt_tokens in zip(paths, workload.prompt_lengths)
            for index in range(prompt_tokens - 1, len(path) - 1)
        ]
        return cls(tokens, depths, ends, predictors)

    def visible(self) -> torch.Tensor:
        """(T, T) bool: may query q see key k?"""
        index = torch.arange(len(self.tokens))
        return (index <= index[:, None]) & (index[:, None] < torch.tensor(self.subtree_ends))


def dense_mask_tree(model: Any, workload: Workload, *, tree_mask: bool = True) -> torch.Tensor:
    """The tree in one row with a dense mask through stock SDPA: right, and quadratic over everything in the row."""
    trie = TokenTrie.build(workload)
    visible = trie.visible()
    if not tree_mask:
        visible = torch.ones_like(visible).tril()
    keep, edge = torch.unique(torch.tensor(trie.predictors), return_inverse=True)
    logits = model(
        input_ids=torch.tensor([trie.tokens]),
        position_ids=torch.tensor([trie.depths]),
        attention_mask=visible[None, None],
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return finish(workload, logits[0].log_softmax(-1)[edge, flat_targets(workload)])


def negative_control(model: Any, workload: Workload) -> torch.Tensor:
    """The same tree with a plain causal mask: wrong on purpose, to show that the comparison notices."""
    return dense_mask_tree(model, workload, tree_mask=False)


# -------------------- PrefixGrouper


def prefix_grouper_published(model: Any, workload: Workload) -> torch.Tensor:
    """The package as its README uses it: logits of every packed position, then `split_output`.

    Its attention runs through our adapter, because the package's own hook is right only with FlashAttention.
    """
    grouper, ids, completions, completion_mask = prefix_grouper_adapter.pack(workload)
    logits = prefix_grouper_adapter.forward(model, grouper, ids).logits
    _, _, suffix_logits, _ = grouper.split_output(logits, include_prefix_last=1)
    logprobs = token_logprobs(suffix_logits[:, :-1], completions)
    return finish(workload, logprobs[completion_mask])


def prefix_grouper_trimmed(model: Any, workload: Workload) -> torch.Tensor:
    """The package's attention at its most favourable: best one-level grouping, only predicting positions scored."""
    boundary = prefix_grouper_adapter.best_boundary(workload)
    grouper, ids, _, _ = prefix_grouper_adapter.pack(workload, boundary)
    rows, columns = prefix_grouper_adapter.predictors(workload, boundary)
    keep, edge = torch.unique(columns, return_inverse=True)
    logits = prefix_grouper_adapter.forward(model, grouper, ids, logits_to_keep=keep).logits
    return finish(workload, logits.log_softmax(-1)[rows, edge, flat_targets(workload)])


# -------------------- Stemma


def use_stemma(model: Any) -> None:
    import stemma

    model.set_attn_implementation("sdpa")
    stemma.enable(model)


def stemma_step(model: Any, workload: Workload) -> torch.Tensor:
    """`PrefixTree.from_groups`, `score`, backward: the planner decides whether sharing pays."""
    import stemma

    tree = stemma.PrefixTree.from_groups(workload.prompts, workload.responses)
    return finish(workload, stemma.score(model, tree).logprobs)


def stemma_streamed(model: Any, workload: Workload) -> torch.Tensor:
    """`backward` under a token budget of eight responses: micro-batches behind one shared prefix."""
    import stemma

    max_tokens = 8 * max(workload.response_lengths)

    tree = stemma.PrefixTree.from_groups(workload.prompts, workload.responses)
    logprobs = torch.zeros_like(workload.weights, dtype=torch.float64)

    def loss(scores: Any) -> torch.Tensor:
        logprobs[scores.sequence, scores.column] = scores.logprobs.detach().double()
        weights = workload.weights[scores.sequence, scores.column].to(scores.logprobs)
        return (scores.logprobs * weights).sum() / workload.scored_tokens

    stemma.backward(model, tree, loss, max_tokens=max_tokens)
    return torch.cat([row[:length] for row, length in zip(logprobs, workload.response_lengths)])


METHODS = {
    method.name: method
    for method in (
        Method("hf_padded", "Hugging Face, padded", use_sdpa, hf_padded),
        Method("each_row_alone", "each row alone", use_sdpa, each_row_alone),
        Method("hf_packed", "Hugging Face, packed (`position_ids`)", use_sdpa, hf_packed),
        Method("dense_mask_tree", "tree with a dense mask", use_sdpa, dense_mask_tree),
        Method("negative_control", "tree with a causal mask (must be wrong)", use_sdpa, negative_control),
        Method(
            "prefix_grouper",
            "prefix_grouper 0.0.1.post1",
            prefix_grouper_adapter.enable,
            prefix_grouper_published,
            prefix_grouper_adapter.missing,
        ),
        Method(
            "prefix_grouper_trimmed",
            "prefix_grouper, trimmed head",
            prefix_grouper_adapter.enable,
            prefix_grouper_trimmed,
            prefix_grouper_adapter.missing,
        ),
        Method("stemma", "Stemma", use_stemma, stemma_step),
        Method("stemma_streamed", "Stemma, streamed", use_stemma, stemma_streamed),
    )
}
