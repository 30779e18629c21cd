"""What counts as rounding is measured on the model: real ones pass in every precision, mixing of positions never."""

import pytest
import torch
from torch import nn

import stemma
from decoders import KINDS, SIZES, decoder, random_tree
from stemma.models.rounding import higher_precision, in_higher_precision, rounded_anew
from stemma.models.tiny import tiny_model
from stemma.scoring import check as checking
from stemma.scoring import self_test

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mixing(nn.Module):
    """An MLP that sees a little of the token before it, as a short convolution does."""

    def __init__(self, mlp, strength):
        super().__init__()
        self.mlp, self.strength = mlp, strength

    def forward(self, hidden):
        return self.mlp(hidden + self.strength * hidden.roll(1, dims=1))


def mixing(dtype, strength):
    model = tiny_model("llama", **SIZES, seed=0, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp, strength)
    return model


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_passes_the_self_test(kind, dtype):
    decoder(kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_little_mixing_of_positions_is_refused_in_every_precision(dtype):
    with pytest.raises(stemma.UnsupportedModelError, match="rounding explains"):
        stemma.enable(mixing(dtype, 0.01))
    stemma.enable(mixing(dtype, 0.0))


@pytest.mark.parametrize(("dtype", "strength"), [(torch.bfloat16, 1.0), (torch.float16, 0.2)])
def test_large_mixing_is_refused_where_there_is_no_memory_for_a_higher_precision(dtype, strength, monkeypatch):
    monkeypatch.setattr(self_test, "higher_precision", lambda model: None)
    with pytest.raises(stemma.UnsupportedModelError, match="rounding explains"):
        stemma.enable(mixing(dtype, strength))
    stemma.enable(mixing(dtype, 0.0))


def test_weights_come_back_from_the_higher_precision():
    model = tiny_model("llama", **SIZES, seed=0, dtype=torch.bfloat16)
    before = [(p, p.data_ptr(), p._version) for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    assert higher_precision(model) == torch.float32
    with in_higher_precision(model, torch.float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [(p, p.data_ptr(), p._version) for p in model.parameters()] == before
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert higher_precision(model.double()) is None


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 1e-8, 1e-4), (torch.bfloat16, 1e-4, 1.0)])
def test_rounding_anew_moves_results_as_far_as_rounding_does(dtype, low, high):
    model = tiny_model("llama", **SIZES, seed=0, dtype=dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        first = model(ids).logits
        with rounded_anew(model):
            other = model(ids).logits
        assert torch.equal(model(ids).logits, first)
        with in_higher_precision(model, torch.float64):
            exact = model(ids).logits
    moved, off = ((x - y).double().norm() / exact.norm() for x, y in ((other, first), (first, exact)))
    assert low < moved < high
    assert off / 5 < moved < off * 20


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_logits_that_are_not_finite_are_named(mode):
    model = stemma.enable(tiny_model("llama", **SIZES, seed=0))
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(stemma.StemmaError, match=r"logits of LlamaForCausalLM .* are not finite"):
        stemma.score(model, random_tree(), mode=mode)
    stemma.disable(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        stemma.enable(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affordable", [True, False])
def test_check_says_both_numbers_and_finds_a_wrong_gradient(dtype, affordable, monkeypatch):
    if not affordable:
        monkeypatch.setattr(checking, "higher_precision", lambda model: None)
    model, tree = decoder(dtype=dtype), random_tree()
    report = stemma.check(model, tree)
    higher = {torch.float32: "float64"}.get(dtype, "float32") if affordable else ""
    assert report.ok, report
    assert report.reference == higher
    expected = f"as close to {higher} as the plain one" if affordable else "no more than its own rounding"
    assert f"exact to rounding: {expected}" in str(report)
    assert f"{report.plain_logprob_error:.1e}" in str(report)
    assert f"{report.logprob_error:.1e}" in str(report)

    from stemma.models import adapter

    honest = adapter.tree_attention
    monkeypatch.setattr(adapter, "tree_attention", lambda q, k, v, *rest, **kw: honest(q, k, v.detach(), *rest, **kw))
    wrong = stemma.check(model, tree)
    assert not wrong.ok
    assert wrong.gradient_error > 0.1
    assert wrong.logprob_error <= wrong.margin * wrong.plain_logprob_error


def test_check_is_bounded_by_tokens_and_time(capsys):
    model, tree = decoder(dtype=torch.float32), random_tree()
    report = stemma.check(model, tree, repeats=3, max_tokens=40, max_seconds=0.0, progress=True)
    assert report.num_sequences * tree.subset([0, 1]).max_length <= 40
    assert report.num_sequences < tree.num_sequences
    assert report.reference == ""
    told = capsys.readouterr().err
    assert told.count("timed: plain") == 1
    assert "plain passes" in told
    with pytest.raises(ValueError, match="repeats"):
        stemma.check(model, tree, repeats=0)


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pretrained_model_passes_in_every_precision(real_model, dtype):
    from transformers import AutoModelForCausalLM

    model = stemma.enable(AutoModelForCausalLM.from_pretrained(real_model, dtype=dtype))
    if dtype != torch.float16:  # whose products take minutes on a CPU
        prompt, responses = list(range(50, 90)), [list(range(n, n + 8)) for n in (300, 400)]
        report = stemma.check(model, stemma.PrefixTree.from_groups([prompt], [responses]))
        assert report.ok, report
        assert report.reference == ("float64" if dtype == torch.float32 else "float32")
    stemma.disable(model)
    mlp = model.model.layers[3].mlp
    model.model.layers[3].mlp = Mixing(mlp, 0.01)
    with pytest.raises(stemma.UnsupportedModelError, match="rounding explains"):
        stemma.enable(model)


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_a_token_whose_embedding_is_nan_is_named(mode):
    model = stemma.enable(tiny_model("llama", tie_word_embeddings=False, seed=0))
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    tree = stemma.PrefixTree.from_groups([list(range(20, 60))], [[[1, 7, 2], [3, 4, 5]]])
    with pytest.raises(stemma.StemmaError, match="not finite"):
        stemma.score(model, tree, mode=mode)
