"""What cannot be computed exactly is refused by name, before work starts; plans and checks say what they found."""

import json

import numpy as np
import pytest
import torch

import stemma
from decoders import SIZES, V, random_tree
from stemma.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("model_type", "extra", "message"),
    [
        ("bloom", {}, "does not dispatch its attention"),
        ("gpt_neo", {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]}, "does not dispatch"),
        ("mamba", {}, "only 0 of them asked for attention"),
        ("bart", {}, "other log-probabilities over a prefix tree"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(model_type, extra, message):
    from stemma.census import build

    model = build(model_type, torch.float32, 0)
    before = model.config._attn_implementation
    with pytest.raises(stemma.UnsupportedModelError, match=message) as caught:
        stemma.enable(model)
    assert model_type in str(caught.value)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bloom", "does not dispatch its attention"),
        ("rwkv", "does not dispatch its attention"),
        ("mamba", "layers of the kind linear_attention"),
        ("lfm2", "layers of the kind conv"),
        ("xlstm", "a state that is carried along"),
        ("bart", "takes no position_ids"),
    ],
)
def test_a_plan_is_refused_where_config_and_modules_show_that_the_model_is_unfit(model_type, message):
    from stemma.census import build

    with pytest.raises(stemma.UnsupportedModelError, match=message) as caught:
        stemma.explain(build(model_type, torch.float32, 0), random_tree())
    assert model_type in str(caught.value)


def test_an_encoder_gets_no_plan_but_the_same_type_as_a_decoder_does():
    bert = tiny_model("bert", **SIZES, seed=0, is_decoder=True)
    assert "Support is not checked here" in stemma.explain(bert, random_tree()).reasons[-1]
    with pytest.raises(stemma.UnsupportedModelError, match=r"model type 'bert'\) is an encoder"):
        stemma.explain(tiny_model("bert", **SIZES, seed=0), random_tree())


@pytest.mark.slow
def test_nothing_that_is_exact_is_refused_by_its_structure():
    from pathlib import Path

    from stemma.census import build
    from stemma.census.report import read
    from stemma.models.support import refuse_by_structure

    rows = read(Path(__file__).parents[2] / "docs" / "support.md")[1]
    refused = 0
    for model_type in (name for name, row in rows.items() if row["Result"] in ("exact", "refused")):
        try:
            refuse_by_structure(build(model_type, torch.float32, 0))
        except stemma.UnsupportedModelError:
            assert rows[model_type]["Result"] == "refused", model_type
            refused += 1
    assert refused >= 65


def test_a_plan_says_what_counts_padding():
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0))
    plan = stemma.explain(model, stemma.PrefixTree.from_sequences([[12, 5, 9, 31], [12, 5, 9, 31, 7]]))
    assert plan.token_ratio == 1
    assert plan.reasons == (
        "1.11 times fewer tokens are encoded than in a padded batch (1.00 without its padding); FLOPs bound the "
        f"speed-up at {plan.flops_ratio:.2f}.",
    )
    rows = str(plan).splitlines()
    assert rows[2].split() == ["padded", "shared", "ratio"]
    assert rows[3].split() == ["tokens", "encoded,", "padding", "too", "10", "9", "1.11"]
    assert rows[4].split() == ["attention", "pairs,", "without", "it", "25", "25", "1.00"]


def test_what_is_no_causal_language_model():
    from transformers import AutoModel, AutoModelForSeq2SeqLM, T5Config

    with pytest.raises(stemma.UnsupportedModelError, match="no transformers PreTrainedModel"):
        stemma.enable(torch.nn.Linear(2, 2))
    llama = tiny_model("llama", **SIZES, seed=0)
    with pytest.raises(stemma.UnsupportedModelError, match="language-model head"):
        stemma.enable(AutoModel.from_config(llama.config))
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(stemma.UnsupportedModelError, match="encoder-decoder"):
        stemma.enable(AutoModelForSeq2SeqLM.from_config(t5))


def test_a_model_that_was_not_enabled():
    model = tiny_model("llama", **SIZES, seed=0)
    with pytest.raises(stemma.UnsupportedModelError, match=r"stemma\.enable"):
        stemma.score(model, random_tree())
    with torch.no_grad():
        assert stemma.score(model, random_tree(), mode="plain").mode == "plain"


def test_bad_batches_for_a_model():
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0))
    with pytest.raises(stemma.InvalidBatchError, match=f"token id {V} lies outside the model's vocabulary of {V}"):
        stemma.score(model, stemma.PrefixTree.from_sequences([[1, V]]))
    with pytest.raises(stemma.InvalidBatchError, match="513 tokens, the model 512 positions"):
        stemma.score(model, stemma.PrefixTree.from_sequences([[1] * 513]))


@pytest.mark.parametrize(
    ("name", "pattern"), [("attention_dropout", r"attention_dropout=0\.1"), ("resid_pdrop", "dropout")]
)
def test_active_dropout(name, pattern):
    model_type = "llama" if name == "attention_dropout" else "gpt2"
    model = stemma.enable(tiny_model(model_type, **SIZES, seed=0, **{name: 0.1}))
    model.train()
    with pytest.raises(stemma.UnsupportedModelError, match=pattern):
        stemma.score(model, random_tree(), mode="shared")
    model.eval()
    stemma.score(model, random_tree(), mode="shared")


def test_attention_weights_and_custom_masks():
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0))
    model.config._output_attentions = True  # transformers' own setter refuses it for all but eager attention
    with pytest.raises(stemma.UnsupportedModelError, match=r"Set it to False\. \(stemma\.score and stemma\.backward"):
        stemma.score(model, random_tree())
    model.config._output_attentions = False
    with pytest.raises(ValueError, match="temperature"):
        stemma.score(model, random_tree(), temperature=0.0)
    with pytest.raises(ValueError, match="mode"):
        stemma.score(model, random_tree(), mode="fast")


def test_a_mask_or_a_cache_cannot_join_a_tree_call():
    from transformers import DynamicCache

    from stemma.models.adapter import LAYOUT_ARGUMENT, TreeCall, tree_call
    from stemma.prefix.layout import Layout

    model, tree = stemma.enable(tiny_model("llama", **SIZES, seed=0)), random_tree()
    call = TreeCall(Layout.of(tree))
    ids = torch.from_numpy(tree.packed_tokens)[None]
    with torch.no_grad(), tree_call(call):
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        with pytest.raises(stemma.UnsupportedModelError, match="mask of its own"):
            model(input_ids=ids, attention_mask=mask, **{LAYOUT_ARGUMENT: call})
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :3], past_key_values=cache)
        with tree_call(call), pytest.raises(stemma.UnsupportedModelError, match="caches"):
            model(input_ids=ids, past_key_values=cache, **{LAYOUT_ARGUMENT: call})


def test_a_mask_that_is_neither_causal_nor_a_window():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    from stemma.models.masks import probe

    no_padding = torch.zeros(1, dtype=torch.int64)
    assert probe(sliding_window_causal_mask_function(5), 20).window == 5
    assert probe(sliding_window_causal_mask_function(30), 20).window is None
    assert probe(chunked_causal_mask_function(32, no_padding), 20).refusal == ""
    assert "neither causal attention nor a sliding" in probe(chunked_causal_mask_function(8, no_padding), 20).refusal
    assert "neither causal" in probe(lambda b, h, q, k: k >= 0, 20).refusal


def test_rotary_frequencies_that_depend_on_the_call_cannot_be_streamed():
    """Packed equals the padded batch, which is what such a model computes for a batch; parts would not."""
    scaling = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 20}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **scaling}
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0, rope_parameters=rope))
    random = np.random.default_rng(0)
    tree = stemma.PrefixTree.from_groups([random.integers(0, V, 15)], [[random.integers(0, V, n) for n in (3, 30, 25)]])
    with torch.no_grad():
        shared, plain = (stemma.score(model, tree, mode=mode).logprobs for mode in ("shared", "plain"))
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-4)
    with pytest.raises(stemma.UnsupportedModelError, match="rotary frequencies"):
        stemma.score(model, tree, mode="shared", max_tokens=20)
    assert any("rotary frequencies" in reason for reason in stemma.explain(model, tree).reasons)


def test_the_planner_takes_the_plain_forward_where_sharing_does_not_pay():
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0))
    random = np.random.default_rng(0)
    alone = stemma.PrefixTree.from_sequences(random.integers(0, V, (4, 30)))
    plan = stemma.explain(model, alone)
    assert plan.mode == "plain"
    assert "below 1.05" in plan.reasons[0]
    with torch.no_grad():
        assert stemma.score(model, alone).mode == "plain"
        assert stemma.score(model, alone, mode="shared").mode == "shared"
    shared = stemma.PrefixTree.from_groups([random.integers(0, V, 60)], [random.integers(0, V, (8, 10))])
    assert stemma.explain(model, shared).mode == "shared"
    streamed = stemma.explain(model, shared, max_tokens=80)
    assert streamed.mode == "streamed"
    assert streamed.parts == 2
    assert json.loads(json.dumps(streamed.to_dict()))["mode"] == "streamed"
    assert "8 sequences" in str(streamed)
    assert "max_tokens=80" in str(streamed)
    rows = [shared.subset(row).unique_tokens for row in shared.split(80)]
    assert f"into {len(rows)} rows instead (PrefixTree.split) it would be {sum(rows)} tokens" in str(streamed)
    with pytest.raises(ValueError, match="max_tokens"):
        stemma.explain(model, shared, max_tokens=0)


def test_check_reports_and_leaves_the_model_as_it_was():
    model = tiny_model("llama", **SIZES, seed=0)
    model.train()
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    report = stemma.check(model, random_tree(), repeats=1)
    assert report.ok
    assert report.max_gradient_difference < 1e-4
    assert "exact to rounding" in str(report)
    assert report.memory_ratio > 1
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert float(model.get_input_embeddings().weight.grad.mean()) == 1.0


def test_check_says_slower_where_sharing_is_slower():
    from dataclasses import replace

    report = stemma.check(tiny_model("llama", **SIZES, seed=0), random_tree(), repeats=1)
    assert "2.00 times faster shared" in str(replace(report, time_ratio=2.0))
    text = str(replace(report, time_ratio=0.69, memory_ratio=0.5))
    assert "1.45 times slower shared" in text
    assert "2.00 times more shared" in text


@pytest.mark.parametrize(
    "tree",
    [
        stemma.PrefixTree.from_sequences([[1]]),
        stemma.PrefixTree.from_groups([[1, 2]], [[[], []]]),
    ],
)
def test_a_batch_without_a_scored_token_cannot_be_checked(tree):
    with pytest.raises(stemma.InvalidBatchError, match="no token of the batch is scored"):
        stemma.check(tiny_model("llama", **SIZES, seed=0), tree)
