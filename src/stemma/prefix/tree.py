"""The prefix tree: a batch of token sequences as a radix tree, laid out depth first.

Every node is a run of tokens that the same set of sequences shares; every sequence is a path from the empty root, so
several prompts make one tree (a forest under that root). Nodes stand in depth-first pre-order, which makes a node's own
tokens contiguous, and all tokens below it contiguous behind them. The tree is found from the tokens alone: rows are
sorted as big-endian byte strings, neighbours are compared once, and a stack over the rows opens and closes the nodes,
so the Python loop runs over sequences and never over tokens.

A shared run shorter than `min_shared` is not made a node (each branch keeps its own copy of it): two responses that
happen to begin alike would cost two more kernel calls and save a handful of tokens. Results do not depend on it.
Building sorts whole rows: milliseconds for hundreds of rows of thousands of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemma.errors import InvalidBatchError
from stemma.prefix.radix import as_ids, as_matrix, radix_nodes, ranges

__all__ = ["PrefixTree"]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A radix tree over `N` token sequences with `R` nodes and `T` packed (distinct) tokens.

    Build one with `from_sequences`, `from_groups` or `from_padded`. Arrays are numpy int64 unless noted. "Flat" arrays
    run over all tokens of all sequences, one sequence behind the other.
    """

    tokens: np.ndarray
    """`(sum of lengths,)` flat token ids of the original sequences."""
    offsets: np.ndarray
    """`(N + 1,)`: sequence `i` owns `tokens[offsets[i]:offsets[i + 1]]`."""
    scored: np.ndarray
    """`(sum of lengths,)` bool, flat: tokens whose log-probability is wanted."""
    column: np.ndarray
    """`(sum of lengths,)` flat: the token's place in a padded result."""
    num_columns: int
    """Width of a padded result."""
    order: np.ndarray
    """`(N,)`: sequences in the order of the tree (sorted by their tokens)."""
    node_parent: np.ndarray
    """`(R,)`: index of the parent node, -1 at the root."""
    node_depth: np.ndarray
    """`(R,)`: position of the node's first token, the number of tokens above it."""
    node_length: np.ndarray
    """`(R,)`: number of the node's own tokens."""
    node_start: np.ndarray
    """`(R,)`: packed index of the node's first token."""
    node_subtree_end: np.ndarray
    """`(R,)`: packed index behind the last token below the node."""
    node_first: np.ndarray
    """`(R,)`: the sequences through the node are `order[node_first:node_last]`."""
    node_last: np.ndarray
    """`(R,)`: see `node_first`."""
    path: np.ndarray
    """`(sum of lengths,)` flat: packed index of each original token."""
    packed_tokens: np.ndarray
    """`(T,)`: token ids in depth-first order."""
    min_shared: int
    """Shortest shared run that became a node."""

    @classmethod
    def from_sequences(cls, sequences: Sequence[Any], *, min_shared: int = 8) -> "PrefixTree":
        """Build the tree of whole sequences; every token behind the first of its sequence is scored.

        Args:
            sequences: `N` one-dimensional runs of token ids (lists, arrays or tensors), unpadded.
            min_shared: shortest shared run that becomes a node, in tokens, at least 1.

        Raises:
            InvalidBatchError: no sequence, an empty sequence, ids that are not integers or out of range.
        """
        rows = [as_ids(sequence, f"sequence {index}") for index, sequence in enumerate(sequences)]
        scored = [np.arange(row.size) > 0 for row in rows]
        columns = [np.arange(row.size, dtype=np.int64) - 1 for row in rows]
        width = max((row.size for row in rows), default=1) - 1
        return cls._build(rows, scored, columns, width, min_shared)

    @classmethod
    def from_groups(
        cls, prompts: Sequence[Any], responses: Sequence[Sequence[Any]], *, min_shared: int = 8
    ) -> "PrefixTree":
        """Build the tree of prompts with several responses each; response tokens are scored.

        Sequences are numbered prompt by prompt, response by response. An empty response is allowed (it has no scored
        token), and so is a prompt without responses (it is left out).

        ```python
        from stemma import PrefixTree

        tree = PrefixTree.from_groups([list(range(100))], [[[7, 8, 9], [7, 5], [4]]])
        print(tree.num_sequences, "sequences,", tree.total_tokens, "tokens,", tree.unique_tokens, "distinct")
        # prints: 3 sequences, 306 tokens, 106 distinct
        ```

        Args:
            prompts: `B` runs of token ids.
            responses: for each prompt a list of runs of token ids; the numbers of responses may differ.
            min_shared: shortest shared run that becomes a node, in tokens, at least 1.

        Raises:
            InvalidBatchError: numbers of prompts and response lists differ, or a response follows an empty prompt (its
                first token has no predecessor to be predicted from: put the BOS token into the prompt).
        """
        if len(prompts) != len(responses):
            raise InvalidBatchError(
                f"from_groups got {len(prompts)} prompts and {len(responses)} lists of responses; give one list each."
            )
        rows, scored, columns = [], [], []
        for group, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
            head = as_ids(prompt, f"prompt {group}")
            for index, answer in enumerate(answers):
                tail = as_ids(answer, f"response {index} of prompt {group}")
                if head.size == 0 and tail.size > 0:
                    raise InvalidBatchError(
                        f"response {index} of prompt {group} has no token before it, so nothing predicts its first "
                        "token. Put at least one token (the BOS token, say) into the prompt."
                    )
                rows.append(np.concatenate([head, tail]))
                scored.append(np.arange(head.size + tail.size) >= head.size)
                columns.append(np.arange(head.size + tail.size, dtype=np.int64) - head.size)
        width = max((int(column[-1]) + 1 for column in columns if column.size), default=0)
        return cls._build(rows, scored, columns, width, min_shared)

    @classmethod
    def from_padded(
        cls,
        input_ids: Any,
        attention_mask: Any,
        *,
        logits_to_keep: int | None = None,
        completion_mask: Any = None,
        min_shared: int = 8,
    ) -> "PrefixTree":
        """Build the tree of a padded batch, in the layout that TRL uses.

        Args:
            input_ids: `(N, L)` integer token ids, padded on the left, the right or both.
            attention_mask: `(N, L)`, 1 on real tokens; they must be one run in each row. Padding is never inferred
                from token ids.
            logits_to_keep: score the last this many columns (default: all but the first).
            completion_mask: `(N, logits_to_keep)`, 1 on columns to be scored (default: every real token there).
            min_shared: shortest shared run that becomes a node, in tokens, at least 1.

        Raises:
            InvalidBatchError: shapes that do not fit, a mask with holes, an all-masked row, or a scored token without a
                token before it.
        """
        ids, mask = as_matrix(input_ids, "input_ids"), as_matrix(attention_mask, "attention_mask").astype(bool)
        if ids.shape != mask.shape:
            raise InvalidBatchError(f"input_ids {ids.shape} and attention_mask {mask.shape} must have one shape.")
        length = ids.shape[1]
        keep = length - 1 if logits_to_keep is None else int(logits_to_keep)
        if not 0 < keep <= length:
            raise InvalidBatchError(f"logits_to_keep must be between 1 and the row length {length}, got {keep}.")
        wanted = np.zeros_like(mask)
        wanted[:, length - keep :] = mask[:, length - keep :]
        if completion_mask is not None:
            chosen = as_matrix(completion_mask, "completion_mask").astype(bool)
            if chosen.shape != (ids.shape[0], keep):
                raise InvalidBatchError(f"completion_mask must be {(ids.shape[0], keep)}, got {chosen.shape}.")
            if (chosen & ~mask[:, length - keep :]).any():
                raise InvalidBatchError("completion_mask asks for tokens that attention_mask hides.")
            wanted[:, length - keep :] &= chosen
        rows, scored, columns = [], [], []
        for index in range(ids.shape[0]):
            real = np.flatnonzero(mask[index])
            if real.size == 0:
                raise InvalidBatchError(f"row {index} of attention_mask is all zero; drop the row.")
            if real[-1] - real[0] + 1 != real.size:
                raise InvalidBatchError(
                    f"row {index} of attention_mask has holes. Padding may stand before and behind the tokens of a "
                    "row, not between them; remove the hidden tokens from input_ids."
                )
            begin, end = int(real[0]), int(real[-1]) + 1
            row_scored = wanted[index, begin:end].copy()
            if row_scored.size and row_scored[0]:
                if logits_to_keep is not None and begin >= length - keep:
                    raise InvalidBatchError(
                        f"row {index} has no prompt token before its first scored token, so nothing predicts it. "
                        "Give every prompt at least one token (the BOS token, say)."
                    )
                row_scored[0] = False
            rows.append(as_ids(ids[index, begin:end], f"row {index}"))
            scored.append(row_scored)
            columns.append(np.arange(begin, end, dtype=np.int64) - (length - keep))
        return cls._build(rows, scored, columns, keep, min_shared)

    @classmethod
    def _build(
        cls,
        rows: list[np.ndarray],
        scored: list[np.ndarray],
        columns: list[np.ndarray],
        num_columns: int,
        min_shared: int,
    ) -> "PrefixTree":
        if not rows:
            raise InvalidBatchError("the batch is empty: give at least one sequence.")
        if min_shared < 1:
            raise InvalidBatchError(f"min_shared counts tokens and must be at least 1, got {min_shared}.")
        for index, row in enumerate(rows):
            if row.size == 0:
                raise InvalidBatchError(f"sequence {index} is empty; every sequence needs at least one token.")
        lengths = np.array([row.size for row in rows], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.concatenate(rows)

        keys = [row.astype(">u4").tobytes() for row in rows]
        order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
        first, last, bottom, parent = radix_nodes([rows[i] for i in order], min_shared)

        depth = np.where(parent >= 0, bottom[parent], 0)
        node_length = bottom - depth
        start = np.cumsum(node_length) - node_length
        # In pre-order the nodes below n are those, behind n, whose first sequence is still one of n's.
        behind = np.searchsorted(first, last, side="left")
        total = int(node_length.sum())
        subtree_end = np.append(start, total)[behind]

        owner = order[first]
        packed_tokens = tokens[ranges(offsets[owner] + depth, node_length)]
        # One entry for each (node, sequence through it), spelled out without a loop over tokens.
        through = last - first
        node_of = np.repeat(np.arange(first.size), through)
        sequence_of = order[ranges(first, through)]
        path = np.empty(tokens.size, dtype=np.int64)
        path[ranges(offsets[sequence_of] + depth[node_of], node_length[node_of])] = ranges(
            start[node_of], node_length[node_of]
        )
        return cls(
            tokens=tokens,
            offsets=offsets,
            scored=np.concatenate(scored),
            column=np.concatenate(columns),
            num_columns=num_columns,
            order=order,
            node_parent=parent,
            node_depth=depth,
            node_length=node_length,
            node_start=start,
            node_subtree_end=subtree_end,
            node_first=first,
            node_last=last,
            path=path,
            packed_tokens=packed_tokens,
            min_shared=min_shared,
        )

    @property
    def num_sequences(self) -> int:
        """Number of sequences, `N`."""
        return int(self.offsets.size - 1)

    @property
    def num_nodes(self) -> int:
        """Number of nodes, `R`."""
        return int(self.node_start.size)

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)`: tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences, shared ones counted each time."""
        return int(self.offsets[-1])

    @property
    def unique_tokens(self) -> int:
        """`T`: tokens of the tree, shared ones counted once."""
        return int(self.packed_tokens.size)

    @property
    def token_ratio(self) -> float:
        """Total over unique tokens: the most that sharing can save."""
        return self.total_tokens / self.unique_tokens

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def node_level(self) -> np.ndarray:
        """`(R,)`: number of nodes above each node."""
        level = np.zeros(self.num_nodes, dtype=np.int64)
        for node, parent in enumerate(self.node_parent):
            if parent >= 0:
                level[node] = level[parent] + 1
        return level

    @property
    def depth(self) -> int:
        """Number of levels: 1 without sharing, 2 for prompts with responses."""
        return int(self.node_level.max()) + 1

    @property
    def positions(self) -> np.ndarray:
        """`(T,)`: position of each packed token in its sequences, its depth in the tree."""
        return ranges(self.node_depth, self.node_length)

    @property
    def multiplicity(self) -> np.ndarray:
        """`(T,)`: number of sequences through each packed token."""
        return np.repeat(self.node_last - self.node_first, self.node_length)

    @property
    def subtree_end(self) -> np.ndarray:
        """`(T,)`: packed token `q` sees packed token `k` exactly when `k <= q < subtree_end[k]`."""
        return np.repeat(self.node_subtree_end, self.node_length)

    @property
    def previous(self) -> np.ndarray:
        """`(T,)`: packed index of the token before each packed token, -1 at position 0."""
        previous = np.arange(-1, self.unique_tokens - 1, dtype=np.int64)
        parent = self.node_parent
        previous[self.node_start] = np.where(parent >= 0, self.node_start[parent] + self.node_length[parent] - 1, -1)
        return previous

    @property
    def scored_targets(self) -> np.ndarray:
        """Packed tokens that some sequence wants scored, ascending: the distinct (path, next token) pairs."""
        wanted = np.zeros(self.unique_tokens, dtype=bool)
        wanted[self.path[self.scored]] = True
        return np.flatnonzero(wanted)

    def children(self, node: int) -> Iterator[int]:
        """Yield the children of `node` in order; -1 is the empty root."""
        child, end = node + 1, self.unique_tokens if node < 0 else int(self.node_subtree_end[node])
        while child < self.num_nodes and self.node_start[child] < end:
            yield child
            child = int(np.searchsorted(self.node_start, self.node_subtree_end[child], side="left"))

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of sequence `index`, `(length,)`."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def subset(self, sequences: np.ndarray) -> "PrefixTree":
        """The tree of some of the sequences, in the given order, with the same scored tokens and columns."""
        spans = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in sequences]
        return PrefixTree._build(
            [self.tokens[span] for span in spans],
            [self.scored[span] for span in spans],
            [self.column[span] for span in spans],
            self.num_columns,
            self.min_shared,
        )

    def split(self, max_tokens: int) -> list[np.ndarray]:
        """Divide the sequences into rows of at most `max_tokens` packed tokens each.

        Whole subtrees stay together where they fit. A subtree over the budget is cut along its branches, and each part
        repeats the path above the cut, which counts. A single sequence over the budget gets a row of its own.

        Returns:
            Arrays of sequence indices; together they hold every sequence once.

        Raises:
            InvalidBatchError: `max_tokens` below 1.
        """
        if max_tokens < 1:
            raise InvalidBatchError(f"max_tokens must be at least 1, got {max_tokens}.")
        rows: list[list[np.ndarray]] = [[]]
        used = 0

        def add(sequences: np.ndarray, cost: int, path_cost: int) -> None:
            nonlocal used
            if rows[-1] and used + cost > max_tokens:
                rows.append([])
                used = path_cost
            rows[-1].append(sequences)
            used += cost

        # (node, tokens on the path above it); the last on the stack comes next.
        stack = [(child, 0) for child in reversed(list(self.children(-1)))]
        while stack:
            node, above = stack.pop()
            size = int(self.node_subtree_end[node] - self.node_start[node])
            own = int(self.node_length[node])
            below = list(self.children(node))
            if not below or above + size <= max_tokens:
                add(self.order[self.node_first[node] : self.node_last[node]], size, above)
                continue
            if rows[-1]:  # the path down to a cut starts a row of its own
                rows.append([])
            used = above + own
            ending = self.order[self.node_first[node] : self.node_first[below[0]]]
            if ending.size:
                rows[-1].append(ending)
            stack.extend((child, above + own) for child in reversed(below))
        return [np.concatenate(row) for row in rows if row]
