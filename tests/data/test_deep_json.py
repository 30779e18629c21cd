"""JSON that nests without end is one message, whichever file of Stemma's holds it."""

import pytest
import torch
from safetensors.torch import save_file

import stemma
from decoders import SIZES
from stemma.cache.anchors import AnchorPool
from stemma.models.tiny import tiny_model
from stemma.search.store import Store
from stemma.serve.prefix_kv import Profile
from stemma.train.tracking import read_rows
from stemma.tune.ntk_attention import load_adapter

DEEP = "[" * 50_000


def anchors(folder, model):
    save_file({"a": torch.zeros(1)}, folder / "pool.safetensors", metadata={"stemma_anchors": DEEP})
    AnchorPool.load(folder / "pool.safetensors")


READERS = {
    "prefix.json": lambda folder, model: stemma.SharedPrefix.from_pretrained(model, folder),
    "adapter_config.json": lambda folder, model: load_adapter(model, folder),
    "profile.json": lambda folder, model: Profile.load(folder / "profile.json"),
    "manifest.json": lambda folder, model: Store(folder),
    "metrics.jsonl": lambda folder, model: read_rows(folder / "metrics.jsonl"),
    "anchors": anchors,
}


@pytest.mark.parametrize("name", READERS)
def test_json_that_nests_without_end_is_refused(tmp_path, name):
    model = stemma.enable(tiny_model("llama", **SIZES), self_test=False)
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(stemma.InvalidDataError):
        READERS[name](tmp_path, model)
