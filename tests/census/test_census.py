"""Every causal-LM type of transformers: exact over a prefix tree, or refused by name; docs/support.md says which."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from stemma.census import NOT_STANDALONE, __main__, build, model_types, shrunken_config
from stemma.census.measure import EXACT, INCONCLUSIVE, NOT_BUILT, REFUSED, WRONG, Measurement, census_tree, measure
from stemma.census.report import read, write
from stemma.errors import NonFiniteError, UnsupportedModelError
from stemma.models import adapter
from stemma.prefix.tree import PrefixTree
from stemma.scoring.enable import enable
from stemma.scoring.score import score

TABLE = Path(__file__).parents[2] / "docs" / "support.md"
MAINSTREAM = (
    *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"),
    *("gpt_oss", "gpt2", "gpt_neox", "olmo2", "olmo3", "phi", "phi3", "cohere2", "deepseek_v3", "granite", "smollm3"),
)

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def table() -> tuple[str, dict[str, dict[str, str]]]:
    return read(TABLE)


@pytest.mark.parametrize("model_type", model_types())
def test_type_is_exact_or_refused_as_the_table_says(
    model_type: str, table: tuple[str, dict[str, dict[str, str]]]
) -> None:
    found = measure(model_type)
    assert found.result != WRONG, found.reason
    version, rows = table
    if version == transformers.__version__:
        assert rows[model_type]["Result"] == found.result, (
            f"docs/support.md says {rows[model_type]['Result']!r}, measured {found.result!r} {found.reason}. If "
            "that is meant, run: python -m stemma.census --write docs/support.md"
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in NOT_STANDALONE])
def test_half_precision_is_judged_as_the_table_says(
    model_type: str, dtype: torch.dtype, table: tuple[str, dict[str, dict[str, str]]]
) -> None:
    model = build(model_type, dtype)
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(3, 20)[None], use_cache=False)
    except Exception as error:
        pytest.skip(f"no forward in this precision: {error}")
    result = EXACT
    try:
        enable(model)
        score(model, PrefixTree.from_groups([list(range(3, 40))], [[[5, 6, 7], [8, 9]]]), mode="shared")
    except NonFiniteError as error:
        pytest.skip(str(error))
    except UnsupportedModelError:
        result = REFUSED
    assert result == table[1][model_type]["Result"]


def test_table_is_complete_and_shows_what_is_promised(table: tuple[str, dict[str, dict[str, str]]]) -> None:
    version, rows = table
    results = [row["Result"] for row in rows.values()]
    assert results.count(EXACT) >= 95
    assert results.count(WRONG) == 0
    assert {row["Result"] for row in rows.values()} <= {EXACT, REFUSED, INCONCLUSIVE, NOT_BUILT}
    if version == transformers.__version__:
        assert sorted(rows) == model_types()
    assert {model_type for model_type in MAINSTREAM if rows[model_type]["Result"] != EXACT} == set()
    refused = [row for row in rows.values() if row["Result"] != EXACT]
    assert all(row["Reason"] for row in refused)
    exercised = [row["Exercised"].split(", ") for row in rows.values() if row["Result"] == EXACT]
    for feature, least in {
        "window": 25,
        "full": 80,
        "sinks": 4,
        "soft-cap": 2,
        "experts": 30,
        "grouped heads": 70,
    }.items():
        assert sum(feature in features for features in exercised) >= least, feature
    assert all(row["Δ gradient float64"] for row in rows.values() if row["Result"] == EXACT)


def test_census_finds_a_forgotten_window(monkeypatch: pytest.MonkeyPatch) -> None:
    # Shorter rows than the window hide this from the self-test of enable; the census must not be fooled.
    honest = adapter.tree_attention
    monkeypatch.setattr(adapter, "tree_attention", lambda *args, **kwargs: honest(*args, **{**kwargs, "window": None}))
    assert measure("llama").result == EXACT
    forgetful = measure("ministral")
    assert forgetful.result == WRONG
    assert forgetful.difference > 1e-2


def test_census_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = adapter.tree_attention

    def detached(query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
        return honest(query, key, value.detach(), *args, **kwargs)

    monkeypatch.setattr(adapter, "tree_attention", detached)
    found = measure("llama")
    assert found.result == WRONG
    assert "gradient" in found.reason


def test_census_reports_a_blunt_control_as_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without keys and values that matter the tree makes no difference, and agreement is no evidence.
    def numb(model_type: str, dtype: torch.dtype, seed: int, window: int | None) -> transformers.PreTrainedModel:
        model = build(model_type, dtype, seed, window)
        for name, parameter in model.named_parameters():
            if "v_proj" in name:
                torch.nn.init.zeros_(parameter)
        return model

    monkeypatch.setattr("stemma.census.measure.build", numb)
    assert measure("llama").result == INCONCLUSIVE


def test_tree_of_the_census_is_deep_and_longer_than_windows() -> None:
    tree = census_tree()
    assert tree.num_sequences >= 5
    assert tree.depth >= 3
    assert tree.token_ratio > 1.5
    assert tree.lengths.max() > 2 * 24


@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in NOT_STANDALONE])
def test_shrunken_configs_keep_every_kind_of_layer(model_type: str) -> None:
    default = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    small = shrunken_config(model_type).get_text_config(decoder=True)
    for kinds in ("layer_types", "mlp_layer_types"):
        assert set(getattr(default, kinds, None) or ()) <= set(getattr(small, kinds, None) or ())
    depth = getattr(small, "num_hidden_layers", None) or 2
    assert 1 < depth <= 16


def test_build_repeats_and_attends() -> None:
    first, again, other = build("qwen3"), build("qwen3"), build("qwen3", seed=1)
    parameters = [dict(model.named_parameters()) for model in (first, again, other)]
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])
    assert not any(torch.equal(parameters[0][name], parameters[2][name]) for name in parameters[0])
    kinds = set(first.config.layer_types)
    assert kinds == {"full_attention", "sliding_attention"}
    assert set(build("qwen3", window=None).config.layer_types) == {"full_attention"}
    with pytest.raises(ValueError, match="gemma3n_text"):
        build("gemma3n")


def test_table_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "support.md"
    measurements = [
        Measurement("a", "A", WRONG, "it | differs\nby 1", ["full"], 1.0, 0.0, None),
        Measurement("b", "B", EXACT, "", ["full", "window"], 3e-6, 2e-15, 0.0),
        Measurement("c", "", NOT_BUILT, "no"),
    ]
    write(path, measurements)
    version, rows = read(path)
    assert version == transformers.__version__
    assert [(name, row["Result"]) for name, row in rows.items()] == [("b", EXACT), ("c", NOT_BUILT), ("a", WRONG)]
    assert rows["a"]["Reason"] == "it / differs by 1"
    assert rows["b"]["Exercised"] == "full, window"
    assert (rows["b"]["Δ log-prob float32"], rows["b"]["float64"]) == ("1e-5", "1e-14")
    assert [entry.name for entry in tmp_path.iterdir()] == ["support.md"]
    with pytest.raises(ValueError, match="not a page"):
        read(Path(__file__))


def test_command_measures_one_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["census", "llama", "mamba"])
    assert __main__.main() == 0
    output = capsys.readouterr().out
    assert "exact" in output
    assert "refused" in output
    monkeypatch.setattr("sys.argv", ["census", "no_such_type"])
    with pytest.raises(SystemExit):
        __main__.main()
