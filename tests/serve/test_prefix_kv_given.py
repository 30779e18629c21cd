"""What PrefixKV is given: rows, files of profiles, and the weights that a profile belongs to."""

import numpy as np
import pytest
import torch

import stemma
from decoders import SIZES
from stemma.models.tiny import tiny_model
from stemma.serve.prefix_kv import Config, Profile, calibrate, compress


def enabled(**options):
    return stemma.enable(tiny_model("llama", **{**SIZES, **options}))


@pytest.mark.parametrize(
    "rows",
    [[1, 2, 3], torch.tensor([1, 2, 3]), np.array([1, 2, 3]), torch.tensor(3), 3, None, "abc", ["abc"], [None]],
    ids=repr,
)
def test_what_is_no_row_is_refused_by_name(monkeypatch, rows):
    model = enabled()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a forward ran"))
    for call in (lambda: compress(model, rows), lambda: calibrate(model, rows, [0.5])):
        with pytest.raises(stemma.InvalidBatchError, match=r"row 0 is .*; expected were rows of token ids"):
            call()


def test_rows_may_be_a_matrix():
    model = enabled()
    ids = torch.arange(2, 42).view(2, 20)
    expected = compress(model, ids.tolist())
    for rows in (ids, ids.numpy(), tuple(ids), iter(ids.tolist())):
        found = compress(model, rows)
        assert [found.positions(layer) for layer in range(2)] == [expected.positions(layer) for layer in range(2)]
    assert calibrate(model, ids, [0.5]) == calibrate(model, ids.tolist(), [0.5])
    with pytest.raises(stemma.InvalidBatchError, match="no rows"):
        compress(model, ids[:0])


def test_a_missing_file_of_a_profile_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(stemma.InvalidDataError, match=f"{path} cannot be read .*calibrate"):
            Profile.load(path)


@pytest.mark.parametrize("where", ["behind the first 64", "the last", "a buffer"])
def test_a_profile_is_refused_by_weights_that_differ_anywhere(where):
    model, row = enabled(), list(range(2, 22))
    model.register_buffer("bias", torch.zeros(8))
    profile = calibrate(model, [row], [0.5])
    compress(model, [row], Config(keep=0.5), profile=profile)
    with torch.no_grad():
        if where == "a buffer":
            model.bias += 1
        for weight in model.parameters() if where != "a buffer" else ():
            weight.flatten()[64 if where == "behind the first 64" else -1 :].add_(1)
    with pytest.raises(stemma.InvalidBatchError, match="other weights"):
        compress(model, [row], Config(keep=0.5), profile=profile)
