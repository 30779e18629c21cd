"""Scores and gradients over a tree against each sequence alone, on whole models, in float64."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stemma
from decoders import KINDS, SIZES, V, cached, decoder, grads_of, keep_double, random_tree, weights_of
from stemma.models.tiny import tiny_model
from stemma.scoring.forward import ForwardSettings, plain_forward
from trees import trees


def _step(model, tree, weights, **arguments):
    model.zero_grad()
    scores = stemma.score(model, tree, entropy=True, temperature=0.8, **arguments)
    (scores.logprobs * weights[0] + scores.entropies * weights[1]).sum().backward()
    return scores, grads_of(model)


def _alone(model, tree, weights):
    """The truth: each sequence in a forward of its own, unpadded, through the model's original attention."""
    stemma.disable(model)
    model.zero_grad()
    parts = [plain_forward(model, tree, np.array([i]), ForwardSettings(0.8, True)) for i in range(tree.num_sequences)]
    logprobs, entropies = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    (logprobs * weights[0] + entropies * weights[1]).sum().backward()
    grads = grads_of(model)
    stemma.enable(model, self_test=False)
    return logprobs.detach(), entropies.detach(), grads


def _assert_equal(got, truth, tolerance=1e-12):
    scores, grads = got
    logprobs, entropies, expected = truth
    torch.testing.assert_close(scores.logprobs.detach(), logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.entropies.detach(), entropies, rtol=tolerance, atol=tolerance)
    assert grads.keys() == expected.keys()
    for name, want in expected.items():
        error = float((grads[name] - want).norm() / want.norm().clamp_min(1e-30))
        assert error <= tolerance or float(want.norm()) < 1e-12, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_equals_each_sequence_alone(kind):
    model, tree = cached(kind), random_tree()
    weights = weights_of(tree)
    with keep_double():
        truth = _alone(model, tree, weights)
        _assert_equal(_step(model, tree, weights, mode="shared"), truth)
        for budget in (1, 12, 30):
            scores, grads = _step(model, tree, weights, mode="shared", max_tokens=budget)
            assert scores.mode == "streamed"
            _assert_equal((scores, grads), truth)
        _assert_equal(_step(model, tree, weights, mode="plain", max_tokens=40), truth)


@settings(max_examples=40)
@given(trees, st.sampled_from(["llama, grouped queries", "gpt_oss, window 5, sinks", "mixtral, experts"]))
def test_equals_each_sequence_alone_on_any_tree(tree, kind):
    if not tree.scored.any():
        return
    model, weights = cached(kind), weights_of(tree)
    with keep_double():
        truth = _alone(model, tree, weights)
        _assert_equal(_step(model, tree, weights, mode="shared"), truth)
        _assert_equal(_step(model, tree, weights, mode="shared", max_tokens=6), truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, tree = decoder(), random_tree()
    weights = weights_of(tree)
    with keep_double():
        truth = _alone(model, tree, weights)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        _assert_equal(_step(model, tree, weights, mode="shared"), truth)
        if not reentrant:
            _assert_equal(_step(model, tree, weights, mode="shared", max_tokens=12), truth)
            return
    with pytest.raises(stemma.UnsupportedModelError, match="use_reentrant"):
        _step(model, tree, weights, mode="shared", max_tokens=12)


def test_checkpointing_is_refused_where_keyword_arguments_do_not_reach_the_layers():
    model = stemma.enable(tiny_model("stablelm", **SIZES, seed=0))
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(stemma.UnsupportedModelError, match="keyword arguments"):
        stemma.score(model, random_tree(), mode="shared")
    with torch.no_grad():
        stemma.score(model, random_tree(), mode="shared")


def test_lora():
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    model, tree = decoder(), random_tree()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.double()
    weights = weights_of(tree)
    with keep_double():
        truth = _alone(wrapped, tree, weights)
        assert truth[2]
        assert all("lora" in name for name in truth[2])
        _assert_equal(_step(wrapped, tree, weights, mode="shared"), truth)
        _assert_equal(_step(wrapped, tree, weights, mode="shared", max_tokens=12), truth)
        with wrapped.disable_adapter(), torch.no_grad():
            reference = stemma.score(wrapped, tree, mode="shared").logprobs
    assert float((reference - truth[0]).abs().max()) > 1e-3


def test_lora_dropout_and_learned_prefixes_are_refused():
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    wrapped = peft.get_peft_model(
        decoder(dtype=torch.float32), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    )
    wrapped.train()
    with pytest.raises(stemma.UnsupportedModelError, match="lora_dropout=0"):
        stemma.score(wrapped, random_tree())
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prefixed = peft.get_peft_model(decoder(dtype=torch.float32), config)
    with pytest.raises(stemma.UnsupportedModelError):
        stemma.score(prefixed, random_tree(), mode="shared")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_auxiliary_loss_counts_shared_tokens_once_for_each_sequence(model_type):
    extra = (
        {"num_local_experts": 4}
        if model_type == "mixtral"
        else {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    )
    model = tiny_model(model_type, **SIZES, num_key_value_heads=2, dtype=torch.float64, seed=0, **extra)
    model.set_experts_implementation("eager")
    stemma.enable(model)
    tree = random_tree()
    with keep_double():
        results = {}
        for mode in ("plain", "shared"):
            model.zero_grad()
            scores = stemma.score(model, tree, aux_loss=True, mode=mode)
            scores.aux_loss.backward()
            results[mode] = (scores.aux_loss.detach(), grads_of(model))
        flat = stemma.PrefixTree.from_sequences([tree.packed_tokens])  # shared tokens counted once: another number
        wrong = stemma.score(model, flat, aux_loss=True, mode="plain").aux_loss
    torch.testing.assert_close(results["shared"][0], results["plain"][0], rtol=1e-6, atol=0)
    assert abs(float(wrong.detach() - results["plain"][0])) > 1e-4
    for name, want in results["plain"][1].items():  # the loss itself is summed in float32 by transformers
        torch.testing.assert_close(results["shared"][1][name], want, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="auxiliary loss"):
        stemma.score(model, tree, aux_loss=True, mode="shared", max_tokens=10)
    with pytest.raises(stemma.UnsupportedModelError, match="auxiliary loss"):
        stemma.score(cached("llama, grouped queries"), tree, aux_loss=True, mode="shared")


def test_float32_and_autocast():
    model, tree = decoder(dtype=torch.float32), random_tree()
    with torch.no_grad():
        plain, shared = (stemma.score(model, tree, mode=mode).logprobs for mode in ("plain", "shared"))
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, shared = (stemma.score(model, tree, mode=mode).logprobs for mode in ("plain", "shared"))
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, plain, rtol=0, atol=0.15)


def test_permuting_sequences_only_permutes_results():
    model, tree = cached("llama, grouped queries"), random_tree()
    order = np.random.default_rng(0).permutation(tree.num_sequences)
    with torch.no_grad():
        one = stemma.score(model, tree, mode="shared").padded()
        other = stemma.score(model, tree.subset(order), mode="shared").padded()
    assert torch.equal(other, one[torch.from_numpy(order)])


def test_results_ragged_and_padded():
    model = cached("llama, grouped queries")
    tree = stemma.PrefixTree.from_groups([[1, 2, 3]], [[[4, 5], [], [6]]], min_shared=1)
    with torch.no_grad():
        scores = stemma.score(model, tree, mode="shared", entropy=True)
    assert [part.numel() for part in scores.ragged()] == [2, 0, 1]
    padded = scores.padded(fill=-7.0)
    assert padded.shape == (3, 2)
    assert padded[1].tolist() == [-7.0, -7.0]
    assert padded[2, 1] == -7.0
    assert torch.equal(padded[0], scores.ragged()[0])
    assert scores.padded("entropies").shape == (3, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="entropy=True"):
        stemma.score(model, tree).padded("entropies")


def test_the_switch_switches():
    """Tokens that reach the embedding, and positions that reach the head."""
    model, tree = decoder(), random_tree()
    seen = {"embedding": 0, "head": 0}
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.update(embedding=seen["embedding"] + inputs[0].numel())
    )
    linear = torch.nn.functional.linear

    def count(x, weight, bias=None):
        seen["head"] += x.numel() // x.shape[-1] if weight.shape[0] == V else 0
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", count)
        scores = stemma.score(model, tree, mode="shared")
        shared = dict(seen)
        seen.update(embedding=0, head=0)
        stemma.score(model, tree, mode="plain")
    assert shared["embedding"] == scores.forwarded_tokens == tree.unique_tokens
    assert seen["embedding"] == tree.num_sequences * tree.max_length
    predicting = np.unique(tree.previous[np.unique(tree.path[tree.scored])]).size
    assert shared["head"] == predicting + 2  # two rows tell what follows the head
    assert seen["head"] == tree.scored.sum() + 2


def test_without_the_tree_a_packed_row_is_wrong():
    """Negative control: under plain causal attention the packed row gives other numbers."""
    model, tree = cached("llama, grouped queries"), random_tree()
    with torch.no_grad():
        shared = stemma.score(model, tree, mode="shared").logprobs
        ids = torch.from_numpy(tree.packed_tokens)[None]
        logits = model(input_ids=ids, position_ids=torch.from_numpy(tree.positions)[None], use_cache=False).logits[0]
        target = tree.path[tree.scored]
        wrong = logits.log_softmax(-1)[tree.previous[target], tree.tokens[tree.scored]]
    assert float((shared - wrong).abs().max()) > 0.1


def test_enabling_leaves_the_ordinary_model_alone():
    model = tiny_model("llama", **SIZES, seed=0)
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        stemma.enable(model)
        after = model(input_ids=ids, attention_mask=mask).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        stemma.disable(model)
        assert torch.equal(
            generated, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        )
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"


def test_forwards_of_other_threads_go_their_own_way():
    """While the head is taken over for a score, another thread's forward of the same model has all its logits."""
    model, tree = decoder(), random_tree()
    ids = torch.tensor([[4, 8, 15, 16], [23, 42, 4, 8]])
    found = []
    plain_forward_of_model = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))

    def meanwhile(module, arguments, output):
        if not found and threading.current_thread() is threading.main_thread():
            plain_forward_of_model.start()
            plain_forward_of_model.join()

    expected = model(ids).logits.detach()
    logprobs = stemma.score(model, tree).logprobs
    handle = model.model.layers[0].register_forward_hook(meanwhile)
    assert torch.equal(stemma.score(model, tree).logprobs, logprobs)
    handle.remove()
    assert torch.equal(found[0], expected)
