"""The benchmarks compare right methods, count right and make the tables that the rows say."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import baselines, long_tree, measure, pages, rows, tables, workloads  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = {
    "groups": workloads.groups("groups", "", 20, 5, 3, prompts=2),
    "ragged": workloads.groups("ragged", "", 17, (1, 9), 4),
    "tree": workloads.agent_tree("tree", "", depth=4, branching=2, segment_tokens=9),
}


@pytest.fixture(scope="module", params=SMALL)
def case(request):
    workload = SMALL[request.param]
    model = measure.build_model(torch.float64, **SIZES)
    baselines.use_sdpa(model)
    logprobs = baselines.each_row_alone(model, workload)
    return workload, measure.Truth(logprobs, measure.gradients(model))


@pytest.mark.parametrize("method", [name for name in baselines.METHODS if name != "each_row_alone"])
def test_every_method_equals_each_row_alone(case, method):
    workload, truth = case
    reason = baselines.METHODS[method].missing()
    if reason:
        pytest.skip(f"{method}: {reason}")
    error = measure.error(method, measure.build_model(torch.float64, **SIZES), workload, truth)
    if method == "negative_control":
        assert error.gradient > 1e-2
        assert error.logprob > 1e-4
    else:
        assert error.gradient < 1e-12
        assert error.logprob < 1e-12


def test_unknown_workload_is_refused():
    with pytest.raises(ValueError, match="unknown workload 'W9'"):
        workloads.make("W9")


def test_workloads_are_the_definition_and_prompts_differ():
    w1, w4, w6 = (workloads.make(name) for name in ("W1", "W4", "W6"))
    assert (w1.total_tokens, w1.unique_tokens) == (9216, 2048)
    assert (w4.total_tokens, w4.unique_tokens) == (10240, 4096)
    assert len({tuple(prompt[:8]) for prompt in w4.prompts}) == 8
    assert (len(w6.rows), w6.unique_tokens) == (32, 63 * 64)
    assert workloads.make("W1").rows == w1.rows
    assert torch.equal(workloads.make("W1").weights, w1.weights)


def test_speed_bounds_are_those_of_the_cost_model():
    """W1 by hand: weights 4 (2·384² + 2·384·128 + 3·384·1024), one head of 8192."""
    config = measure.build_model().config
    weights = 4 * (2 * 384**2 + 2 * 384 * 128 + 3 * 384 * 1024)

    def flops(tokens, pairs, scored):
        return 3 * (2 * weights * tokens + 4 * 384 * 4 * pairs + 2 * 384 * 8192 * scored)

    padded = flops(8 * 1152, 8 * 1152**2 / 2, 8 * 128)
    shared = flops(1024 + 8 * 128, 1024**2 / 2 + 8 * (1024 * 128 + 128**2 / 2), 8 * 127 + 1)
    assert measure.speed_bound(workloads.make("W1"), config) == pytest.approx(padded / shared, rel=1e-12)
    assert padded / shared == pytest.approx(3.67, abs=0.01)


def test_interleaving_is_a_palindrome_and_ratios_pair_neighbours():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    timings = measure.interleaved(steps, blocks=2, once={"C"})
    assert "".join(order) == "ABCCBA" + "ABBA"
    assert [len(timings[name].cpu) for name in "ABC"] == [4, 4, 2]
    ratio = measure.Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2.5, 2.0, 3.0, 2)


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)

    def step():
        hidden = layer(x)  # saves x (and the weight, which does not count)
        (hidden * hidden).sum().backward()  # saves hidden twice, one storage

    assert measure.saved_bytes(step, layer) == 2 * x.nbytes


def test_largest_tensor_sees_a_square_and_the_tree_makes_none():
    with long_tree.LargestTensor() as seen:
        x = torch.randn(50, 2)
        _ = x @ x.T
    assert (seen.elements, seen.operation) == (2500, "aten.mm.default")
    workload = long_tree.make(scale=8)
    assert long_tree.limit(workload) < workload.unique_tokens**2
    assert long_tree.largest_tensor(workload, workload.vocab_size).elements <= long_tree.limit(workload)


def filled(folder):
    """Rows of two workloads, written to a folder."""
    recorder = rows.Recorder(threads=1)
    for name in ("W1", "W2"):
        shapes = workloads.make(name).shapes | {"speed_bound": 3.67}
        for method, value in (("prefix_grouper", 2.5), ("stemma", 3.5)):
            row = {"workload": name, "method": method, "shapes": shapes, "spread": (value - 0.1, value + 0.1)}
            for metric in ("cpu_speedup", "wall_speedup", "fraction_of_bound"):
                recorder.add("speed", metric=metric, unit="x", value=value, baseline="hf_padded", repeats=6, **row)
            recorder.add("speed", metric="saved_bytes", unit="B", value=value * 2**30, **row)
    recorder.save(folder)
    return recorder


def test_rows_of_a_measurement_are_replaced_and_carry_no_place(tmp_path):
    filled(tmp_path)
    filled(tmp_path)
    found = rows.load(tmp_path / "speed.jsonl")
    assert len(found) == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.jsonl"]
    context = {"baseline", "shapes", "threads", "machine", "versions", "commit", "dirty", "date"}
    assert context <= set(found[0])
    assert str(Path.home()) not in json.dumps(found)
    assert str(ROOT) not in json.dumps(found)


def test_tables_are_made_from_rows_and_staleness_is_noticed(tmp_path, monkeypatch, capsys):
    filled(tmp_path)
    readme, index = tmp_path / "README.md", tmp_path / "index.md"
    for page in (readme, index):
        page.write_text("before\n<!-- headline:begin -->\nold\n<!-- headline:end -->\nafter\n")
    places = {"ROOT": tmp_path, "RESULTS": tmp_path, "FIGURES": tmp_path / "figures", "PAGE": tmp_path / "page.md"}
    for name, value in {**places, "README": readme, "INDEX": index}.items():
        monkeypatch.setattr(tables, name, value)
    with pytest.raises(SystemExit) as stale:
        tables.main(["--check"])
    assert stale.value.code == 1
    assert "README.md is not what the result rows say" in capsys.readouterr().out

    tables.main([])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert f"| {tables.UPDATES['W1']} | padded batch | **3.50×** | – → 3584 |" in text
    assert "| W1: P 1024, R 128, G 8 | 4.50 | 3.67× |" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "figures" / "speed.svg").exists()
    with pytest.raises(SystemExit) as fresh:
        tables.main(["--check"])
    assert fresh.value.code == 0


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match="results:begin"):
        pages.with_block("no markers", "block")


def test_the_page_on_generation_says_what_the_rows_say():
    from benchmarks import hydragen_table

    text = hydragen_table.PAGE.read_text(encoding="utf-8")
    block = hydragen_table.block(rows.load(rows.RESULTS / "hydragen.jsonl"))
    assert pages.with_block(text, block, "hydragen") == text


def test_no_script_hides_a_module_of_python():
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # `python benchmarks/x.py` puts them first
    assert not names & sys.stdlib_module_names
