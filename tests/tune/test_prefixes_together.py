"""A learned prefix and caches of shared prefixes together: decoding below both is the plain model with the adapter."""

import numpy as np
import pytest
import torch

import stemma
from decoders import KINDS, V, cached, decoder, keep_double
from stemma.decode import loop as decoding
from stemma.decode.generate import Config
from stemma.decode.rollout import LocalGenerator
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.errors import UnsupportedModelError
from stemma.tune.ntk_attention import attach, detach

HEAD = list(range(1, 20))
PROMPTS = [[*HEAD, 9], [*HEAD, 20, 21], [*HEAD, 20, 30, 31], [40, 41]]


def weigh(model, seed=0):
    """Attach a prefix that matters: heavy, with values of size 1 that differ by feature."""
    attach(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kernel_prefix" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def step(model, cache, rows, fed, mask):
    positions = (mask.cumsum(1) - 1)[:, -fed.shape[1] :]
    return model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("handle", [False, True])
def test_float64_logits_are_those_of_each_row_alone(kind, handle):
    """Grouped queries, windows, sinks, soft-caps; several new tokens; rows that change places."""
    model = decoder(kind)
    plain = model(torch.tensor([PROMPTS[1]])).logits
    with keep_double(), torch.no_grad():
        weigh(model)
        assert (model(torch.tensor([PROMPTS[1]])).logits - plain).abs().max() > 1e-2
        prefix = stemma.SharedPrefix.from_ids(model, HEAD[:7]).extend(HEAD[7:12]) if handle else None
        head = HEAD[:12] if handle else []
        rows = [[*HEAD[12:], 9], [*HEAD[12:], 20, 21], [2]] if handle else PROMPTS
        cache = SharedPrefixCache.of(model, rows, prefix=prefix, call_bytes=0, room=1)
        assert cache.states.num_runs > 0
        whole = [head + row for row in rows]
        longest = max(map(len, whole))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in whole])
        fed = torch.tensor([[row[-1]] for row in whole])
        random = np.random.default_rng(0)
        for new in (1, 1, 3, 2):
            got = step(model, cache, whole, fed, mask)
            for row, logits in zip(whole, got, strict=True):
                expected = model(torch.tensor([row])).logits[0, -fed.shape[1] :]
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
            index = torch.from_numpy(random.permutation(len(whole)))
            cache.reorder_cache(index)
            fed = torch.from_numpy(random.integers(0, V, (len(whole), new)))
            whole = [whole[i] + tokens for i, tokens in zip(index, fed.tolist())]
            mask = torch.cat([mask[index], mask.new_ones(len(whole), new)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama, grouped queries", "mistral, window 5", "gpt2, learned positions"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 3}])
def test_generate_gives_the_tokens_of_the_models_own_generate(kind, dtype, options):
    model = weigh(decoder(kind, dtype))
    if dtype == torch.bfloat16 and options["do_sample"]:
        pytest.skip("samples of so coarse logits turn on their rounding")
    texts = []
    for share in ("always", "never"):
        torch.manual_seed(3)
        sharing = Config(share=share)
        found = stemma.generate(model, None, PROMPTS, max_new_tokens=6, sharing=sharing, **options)
        texts.append(found.token_ids)
    assert found.report is None
    assert texts[0] == texts[1]
    detach(model)
    torch.manual_seed(3)
    assert stemma.generate(model, None, PROMPTS, max_new_tokens=6, **options).token_ids != texts[0]


def test_rollouts_share_prompts_and_their_log_probabilities_are_those_that_train(monkeypatch):
    model, made = weigh(decoder(dtype=torch.float64)), []
    of = decoding.SharedPrefixCache.of
    monkeypatch.setattr(
        decoding.SharedPrefixCache, "of", lambda *args, **options: made.append(of(*args, **options)) or made[-1]
    )
    with keep_double():
        rows = LocalGenerator(eos_token_id=60)(model, PROMPTS, num_generations=3, max_new_tokens=5, seed=0)
        assert len(made) == 1
        tree = stemma.PrefixTree.from_groups(PROMPTS, rows.completions)
        with torch.no_grad():
            trained = stemma.score(model, tree, mode="shared").logprobs
    sampled = torch.cat([values for group in rows.logprobs for values in group])
    torch.testing.assert_close(sampled, trained, rtol=0, atol=1e-12)


def test_gradients_of_the_prefix_are_refused():
    """The keys of the first layer have none; the answer of the prefix has."""
    model = weigh(decoder(num_hidden_layers=1))
    cache = SharedPrefixCache.of(model, [[5, 6, 7]])
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)


def test_a_model_without_a_prefix_makes_no_further_call(monkeypatch):
    from stemma.attention import decode

    merges, original = [], decode.merge
    monkeypatch.setattr(decode, "merge", lambda *args: merges.append(1) or original(*args))
    model = cached("llama, grouped queries")
    counts = []
    for _ in range(2):
        cache = SharedPrefixCache.of(model, [HEAD] * 3, call_bytes=0)
        with torch.no_grad():
            step(model, cache, None, torch.tensor([[19]] * 3), torch.ones(3, 19, dtype=torch.int64))
        counts.append(len(merges))
        merges.clear()
        if len(counts) == 1:
            weigh(model)
    detach(model)
    assert counts[1] == counts[0] + 2  # one in each layer for the learned prefix
