"""Stores: rows count or they do not, whatever happens to the process; the nearest rows are those of a full sort."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from stemma.errors import InvalidDataError, OutputError
from stemma.search.store import Store, nearest

COLUMNS = {"keys": ("float32", (3,)), "values": ("int32", ())}


def opened(path, **about):
    return Store.open(path / "store", COLUMNS, about or {"model": "m"})


def rows(count, first=0):
    return {"keys": np.arange(3 * count).reshape(count, 3) + first, "values": np.arange(count) + first}


def test_rows_come_back_from_another_process_s_view(tmp_path):
    store = opened(tmp_path)
    assert store["keys"].shape == (0, 3)
    store.append(**rows(4))
    store.append(**rows(2, first=4))
    again = opened(tmp_path)
    assert again.rows == {"keys": 6, "values": 6}
    assert np.array_equal(again["values"], np.arange(6))
    assert np.array_equal(again["keys"][4:], rows(2, first=4)["keys"])
    with pytest.raises(ValueError, match="read-only"):
        again["keys"][0] = 1


def test_what_does_not_fit_is_refused(tmp_path):
    store = opened(tmp_path)
    store.append(**rows(2))
    for arrays, complaint in (
        ({"keys": np.ones((2, 3))}, r"rows need the arrays \['keys', 'values'\], got \['keys'\]"),
        ({"keys": np.ones((2, 4)), "values": [1, 2]}, r"a row of 'keys' has the shape \(3,\), got \(4,\)"),
        ({"keys": [[1.0, np.nan, 0.0]], "values": [1]}, "'keys' holds values that are not finite"),
        ({"keys": [[1.0, 1e39, 0.0]], "values": [1]}, "'keys' holds values that are not finite in float32"),
    ):
        with pytest.raises(InvalidDataError, match=complaint), np.errstate(over="ignore"):
            store.append(**arrays)
    with pytest.raises(InvalidDataError, match="was made with model = m, now it is n; remove the folder"):
        opened(tmp_path, model="n")
    with pytest.raises(InvalidDataError, match="was made with keys = "):
        Store.open(tmp_path / "store", {**COLUMNS, "keys": ("float16", (3,))}, {"model": "m"})
    other = opened(tmp_path)
    other.append(**rows(1))
    with pytest.raises(OutputError, match="another process has added rows"):
        store.append(**rows(1))
    assert opened(tmp_path).rows == {"keys": 3, "values": 3}


def test_a_store_without_its_manifest_or_rows_is_refused(tmp_path):
    store = opened(tmp_path)
    store.append(**rows(5))
    os.truncate(store.folder / "values.bin", 8)
    with pytest.raises(InvalidDataError, match="does not hold the 5 rows"):
        opened(tmp_path)
    (store.folder / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InvalidDataError, match="is not of format 1"):
        opened(tmp_path)
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(InvalidDataError, match=r"has no readable manifest.json"):
        opened(tmp_path)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(InvalidDataError, match=r"has no readable manifest.json"):
        opened(tmp_path)


APPEND = """
import sys
import numpy as np
from stemma.search.store import Store
store = Store(sys.argv[1])
while True:
    first = store.rows["keys"]
    store.append(keys=np.arange(first, first + 500)[:, None].repeat(3, axis=1), values=np.arange(first, first + 500))
"""


def test_a_killed_process_leaves_whole_rows(tmp_path):
    folder = opened(tmp_path).folder
    for _ in range(3):
        before = Store(folder).rows["keys"]
        process = subprocess.Popen([sys.executable, "-c", APPEND, folder])
        while Store(folder).rows["keys"] == before:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.05)
        process.kill()
        process.wait()
    with (folder / "keys.bin").open("ab") as file:
        file.write(b"half a row")
    store = Store(folder)
    store.append(**rows(1, first=store.rows["keys"]))
    count = store.rows["values"]
    assert np.array_equal(Store(folder)["values"], np.arange(count))
    assert np.array_equal(Store(folder)["keys"][:-1], np.arange(count - 1)[:, None].repeat(3, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_nearest_rows_are_those_of_a_full_sort(monkeypatch, dtype):
    monkeypatch.setattr("stemma.search.store._BLOCK_BYTES", 4 * 4 * 37)  # blocks of 37 rows
    generator = np.random.default_rng(0)
    matrix = generator.integers(-2, 3, (200, 4)).astype(dtype)  # many equal products
    queries = generator.integers(-2, 3, (9, 4)).astype(np.float32)
    full = queries @ matrix.astype(np.float32).T
    order = np.lexsort((np.broadcast_to(np.arange(200), full.shape), -full), axis=1)
    for k in (1, 5, 60, 200, 300):
        scores, found = nearest(matrix, queries, k)
        assert np.array_equal(found, order[:, :k])
        assert np.array_equal(scores, np.take_along_axis(full, order[:, :k], axis=1))
    assert nearest(matrix[:0], queries, 3)[1].shape == (9, 0)
    assert nearest(matrix, queries[:0], 3)[1].shape == (0, 3)


def test_distances_are_products_with_one_more_dimension():
    points, query = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), np.array([[0.3, -0.2, 0.9]])
    longer = np.hstack([points, -(points**2).sum(axis=1, keepdims=True) / 2])
    _, found = nearest(longer, np.hstack([query, [[1.0]]]), 50)
    assert found[0].tolist() == np.argsort(((points - query) ** 2).sum(axis=1)).tolist()
