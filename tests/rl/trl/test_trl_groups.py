"""The parts of the TRL adapter that need no TRL: groups kept whole, and the error where TRL is missing."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma.errors import MissingExtraError, StemmaError
from stemma.rl import trl as adapter


def shuffled_slices(group_sizes: list[int], num_slices: int, seed: int) -> list[dict[str, Any]]:
    """Rows numbered in `row`, shuffled and cut as TRL does; group g has the prompt g + 1 behind g % 3 paddings."""
    group = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    group, size = group[order], len(group) // num_slices
    prompts = torch.stack([(group % 3 < 1).long(), (group % 3 < 2).long(), torch.ones_like(group)], dim=1)
    rows = {"prompt_mask": prompts, "prompt_ids": prompts * (group + 1)[:, None], "row": order, "group": group}
    return [
        {
            **{key: value[start : start + size] for key, value in rows.items()},
            "names": [f"row {number}" for number in order[start : start + size]],
            "num_items_in_batch": torch.tensor(17),
            "old_per_token_logps": None,
        }
        for start in range(0, size * num_slices, size)
    ]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 10_000))
def test_groups_are_contiguous_and_nothing_else_changes(sizes: list[int], num_slices: int, seed: int) -> None:
    sizes[-1] += -sum(sizes) % num_slices
    before = shuffled_slices(sizes, num_slices, seed)
    after = adapter.keep_groups_whole(before)

    groups = torch.cat([part["group"] for part in after]).tolist()
    runs = [value for index, value in enumerate(groups) if index == 0 or groups[index - 1] != value]
    assert len(runs) == len(set(runs)), "a group is in two places"
    shuffled = torch.cat([part["group"] for part in before]).tolist()
    assert runs == list(dict.fromkeys(shuffled)), "groups follow the order of their first rows"

    assert [len(part["row"]) for part in after] == [len(part["row"]) for part in before]
    assert sorted(torch.cat([part["row"] for part in after]).tolist()) == list(range(sum(sizes)))
    prompt_of = {
        int(row): ids.tolist() for part in before for row, ids in zip(part["row"], part["prompt_ids"], strict=True)
    }
    for part in after:
        assert part["num_items_in_batch"] == 17
        assert part["old_per_token_logps"] is None
        assert part["names"] == [f"row {row}" for row in part["row"]]
        assert [prompt_of[int(row)] for row in part["row"]] == part["prompt_ids"].tolist()


def test_a_prompt_is_its_tokens_and_its_mask() -> None:
    """Padding that looks like a token does not make two prompts one."""
    ids = torch.tensor([[7, 5], [7, 5], [7, 5], [7, 5]])
    mask = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]])
    (part,) = adapter.keep_groups_whole([{"prompt_ids": ids, "prompt_mask": mask, "row": torch.arange(4)}])
    assert part["row"].tolist() == [0, 2, 1, 3]


def test_every_order_of_groups_occurs() -> None:
    orders = set()
    for seed in range(60):
        slices = adapter.keep_groups_whole(shuffled_slices([4, 4, 4], 3, seed))
        assert all(len(part["group"].unique()) == 1 for part in slices)
        orders.add(tuple(part["group"][0].item() for part in slices))
    assert len(orders) == 6


def test_an_entry_without_one_row_per_sequence_is_refused() -> None:
    slices = shuffled_slices([2, 2], 2, 0)
    for part in slices:
        part["pixel_values"] = torch.zeros(5, 3)
    with pytest.raises(StemmaError, match=r"'pixel_values' has 10 rows where the batch has 4"):
        adapter.keep_groups_whole(slices)


def test_missing_trl_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(vars(adapter), "GRPOTrainer", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'stemma-lm\[trl\]'"):
        _ = adapter.GRPOTrainer


def test_importing_the_module_does_not_import_trl() -> None:
    code = "import sys, stemma.rl.trl; print('trl' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["False"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SFTTrainer"):
        _ = adapter.SFTTrainer
