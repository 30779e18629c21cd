"""Whose keys and values KVCOMM works with: those of another model, header or cache are made again or refused."""

import pytest
import torch

from stemma.cache.anchors import AnchorPool
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.rotary import cached_states, encode
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.serve.kvcomm import Config, KVComm

TEMPLATE = "Read this.\n{document}\nWhat is it about?"
TEXT = "the dog and the cat"


def model_of(seed=0, model_type="llama", **options):
    return tiny_model(model_type, vocab_size=258, seed=seed, **{"dtype": torch.float64, **options})


def comm_of(model, pool=None, **config):
    return KVComm(model, byte_tokenizer(), config=Config(**{"min_anchors": 1, "recompute": 0.0} | config), pool=pool)


def largest(prefill, model):
    """From a forward over the whole prompt, largest difference of the first layer, and of all."""
    pairs = list(zip(cached_states(prefill.cache), cached_states(encode(model, prefill.ids[:-1])), strict=True))
    off = [max(float((x - y).abs().max()) for x, y in zip(*pair, strict=True)) for pair in pairs]
    return off[0], max(off)


def answered(comm, agent, tokens=5, **contents):
    prefill = agent.prefill(contents)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    return prefill, comm.model.generate(**prefill.inputs, past_key_values=prefill.cache, **options)


@pytest.mark.parametrize("other", ["model", "header"])
def test_a_text_of_another_model_or_header_is_encoded_again(other):
    model = model_of()
    here = comm_of(model)
    there = comm_of(model_of(1)) if other == "model" else comm_of(model, header="HEADER ")
    document = here.content(TEXT)
    here.agent("reader", TEMPLATE).prefill({"document": document})
    agent = there.agent("reader", TEMPLATE)
    learned = agent.prefill({"document": document}, mode="learn")
    reused = agent.prefill({"document": document}, mode="reuse")
    assert learned.usage.encoded == len(there.header) + len(TEXT)
    assert reused.usage.encoded == 0
    for prefill in (learned, reused):
        assert largest(prefill, there.model)[1] < 1e-6
    fresh = comm_of(there.model, header=there.config.header)
    expected = fresh.base(fresh.content(TEXT))[0]
    assert all(
        torch.equal(x, y) for a, b in zip(document.base, expected, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_an_answer_of_another_model_is_refused_but_where_its_tokens_are_enough():
    here, there = comm_of(model_of()), comm_of(model_of(1))
    asking = here.agent("ask", TEMPLATE)
    answer = asking.answer(*answered(here, asking, document=TEXT))
    agent = there.agent("check", "He said\n{answer}\nabout\n{document}\nIs it so?")
    contents = {"answer": answer, "document": there.content(TEXT)}
    for mode in ("auto", "learn", "reuse", "blend"):
        with pytest.raises(InvalidBatchError, match="5 generated tokens came with keys and values of another model"):
            agent.prefill(contents, mode=mode)
    assert contents["document"].base is None  # nothing was computed for it
    assert largest(agent.prefill(contents, mode="dense"), there.model)[1] < 1e-6
    assert here.agent("check", agent.template).prefill(contents).mode == "dense"  # the text is encoded again there


CHANGES = {
    "counted": lambda m: m.model.layers[0].self_attn.k_proj.weight.mul_(2),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_needs_an_empty_pool_and_no_more(change):
    comm = comm_of(model_of())
    agent, document = comm.agent("reader", TEMPLATE), comm.content(TEXT)
    agent.prefill({"document": document})
    before, row = answered(comm, agent, document=document)
    with torch.no_grad():
        CHANGES[change](comm.model)
    with pytest.raises(InvalidBatchError, match=r"another .*Start with an empty pool"):
        agent.prefill({"document": document})
    comm.pool = AnchorPool()
    with pytest.raises(InvalidBatchError, match="this prefill is of another model"):
        agent.answer(before, row)
    for mode in ("dense", "learn", "reuse"):
        assert largest(agent.prefill({"document": document}, mode=mode), comm.model)[1] < 1e-6, mode
    assert largest(agent.prefill({"document": TEXT[4:]}, mode="reuse"), comm.model)[0] < 1e-6
    with pytest.raises(InvalidBatchError, match="agent 'reader' with another template"):
        comm.agent("reader", TEMPLATE + " ")  # the new pool knows it, too


def test_an_agent_made_after_a_change_is_refused():
    comm = comm_of(model_of())
    with torch.no_grad():
        comm.model.model.embed_tokens.weight.add_(1)
    with pytest.raises(InvalidBatchError, match="another weights"):
        comm.agent("reader", TEMPLATE)


def test_a_bias_of_the_router_belongs_to_the_model():
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = model_of(model_type="deepseek_v3", first_k_dense_replace=1, **sizes, **experts)
    model.set_experts_implementation("eager")
    agent = comm_of(model).agent("reader", TEMPLATE)
    agent.prefill({"document": TEXT})
    (bias,) = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    bias.add_(torch.arange(bias.numel()).flip(0))
    with pytest.raises(InvalidBatchError, match="another weights"):
        agent.prefill({"document": TEXT})


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = model_of()
    agent = comm_of(model).agent("reader", TEMPLATE)
    assert [agent.prefill({"document": TEXT}).mode for _ in range(2)] == ["dense", "reuse"]


def test_a_part_in_training_mode_keeps_it_and_may_not_drop():
    model = model_of(attention_dropout=0.1)
    model.model.layers[0].mlp.train()
    agent = comm_of(model).agent("reader", TEMPLATE)
    assert model.model.layers[0].mlp.training
    model.model.layers[0].train()
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.self_attn' is in training mode and has dropout"):
        agent.prefill({"document": TEXT})


def test_several_samples_and_beams_go_on_from_a_repeated_cache_and_are_no_answer():
    comm = comm_of(model_of())
    agent = comm.agent("reader", TEMPLATE)
    for options in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        prefill = agent.prefill({"document": TEXT}, mode="dense")
        options |= {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 257}
        expected = comm.model.generate(**prefill.inputs, **options)
        prefill.cache.batch_repeat_interleave(2)
        rows = comm.model.generate(**prefill.inputs, past_key_values=prefill.cache, **options)
        assert torch.equal(rows, expected)
        with pytest.raises(InvalidBatchError, match="in a cache of one row, got 1 in a cache of 2"):
            agent.answer(prefill, rows[0])
    prefill, row = answered(comm, agent, document=TEXT)
    with pytest.raises(InvalidBatchError, match="in a cache of one row, got 2 in a cache of 1"):
        agent.answer(prefill, row.repeat(2, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_answer_has_the_tokens_of_its_cache(dtype):
    comm = comm_of(model_of(dtype=dtype))
    agent = comm.agent("reader", TEMPLATE)
    prefill, row = answered(comm, agent, document=TEXT)
    start = len(prefill.ids)
    assert agent.answer(prefill, row).ids == tuple(row[0, start:].tolist())
    other = row.clone()
    other[0, start + 2] = (other[0, start + 2] + 1) % 256
    with pytest.raises(
        InvalidBatchError, match=f"token {start + 2} of the sequence is not the one that the cache holds"
    ):
        agent.answer(prefill, other)
    other = row.clone()
    other[0, -1] = (other[0, -1] + 1) % 256  # sampled and not yet run, so the cache does not say
    assert len(agent.answer(prefill, other).ids) == 5


def test_by_default_what_is_reused_is_blended_within_the_error_and_the_window():
    model, document = model_of(), "def area(w, h):\n    return w * h  # of a rectangle\n"
    comm = comm_of(model, recompute=Config().recompute)
    agent = comm.agent("reader", TEMPLATE)
    for text in (TEXT, document):
        agent.prefill({"document": text}, mode="learn")
    given = {"document": document[::-1]}
    auto, blend, alone = (agent.prefill(given, mode=mode) for mode in ("auto", "blend", "reuse"))
    assert (auto.mode, alone.mode) == ("blend", "reuse")
    assert auto.usage.computed == round(0.15 * (auto.usage.prompt - 1 - auto.usage.exact)) > 0
    assert largest(auto, model) == largest(blend, model)
    assert largest(auto, model)[1] < largest(alone, model)[1]
    comm.config = Config(min_anchors=1, max_error=1e-9)
    assert "estimated keys are off by" in agent.prefill(given).reason
