"""KVCOMM against dense prefill: what is exact, what is refused, why something falls back, and what each switch does."""

import threading
from functools import cache

import pytest
import torch
import transformers

from stemma.cache.anchors import AnchorPool
from stemma.census.configs import randomize_
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.rotary import cached_states, encode
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.serve.kvcomm import Config, KVComm
from stemma.tune.ntk_attention import attach, disable_adapter

transformers.logging.set_verbosity_error()

TYPES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_oss": {"sliding_window": 5, "num_local_experts": 4},
    "glm4": {},
    "cohere2": {"sliding_window": 5},
    "gpt_neox": {},
    "phi": {},
    "stablelm": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "deepseek_v3": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "n_group": 1},
    "gptj": {"rotary_dim": 8},
}
DOCUMENT, QUESTION = "def area(w, h): return w * h", "What does area take?"
ASK = "Read this.\n{document}\nThen answer.\n{question}\nAnswer:"
CHECK = "A colleague was asked:\n{question}\nabout\n{document}\nIs it clear? "


@cache
def model_of(model_type="llama", layers=3):
    options = {"num_hidden_layers": layers, "hidden_size": 32, "num_attention_heads": 2, "dtype": torch.float64}
    model = tiny_model(model_type, vocab_size=258, max_position_embeddings=600, **options, **TYPES[model_type])
    randomize_(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = 256
    return model


def comm_of(model_type="llama", pool=None, **config):
    config = Config(**{"min_anchors": 2, "sharpness": 200.0, "recompute": 0.0} | config)
    return KVComm(model_of(model_type), byte_tokenizer(), config=config, pool=pool)


def largest(some, others):
    pairs = zip(cached_states(some), cached_states(others), strict=True)
    return max(float((x - y).abs().max()) for a, b in pairs for x, y in zip(a, b, strict=True))


def largest_above(some, others):
    """Without the first layer, whose angles are those of the model in float32."""
    pairs = list(zip(cached_states(some), cached_states(others), strict=True))
    assert max(float((x - y).abs().max()) for x, y in zip(*pairs[0], strict=True)) < 1e-5
    return max(float((x - y).abs().max()) for a, b in pairs[1:] for x, y in zip(a, b, strict=True))


def texts(comm, number=0):
    return {
        "document": comm.content(f"{DOCUMENT} # {number}{number * 7 % 10}{number * 3 % 10}"),
        "question": comm.content(f"{QUESTION} {number}{number * 3 % 10}"),
    }


def filled(comm, agent, count=3):
    """A pool that has seen ``count`` other documents and questions."""
    for number in range(1, count + 1):
        assert agent.prefill(texts(comm, number), mode="learn").learned == agent.template.names
    return agent


class Counting:
    """Counts tokens that run through a model."""

    def __init__(self, model):
        self.tokens = 0
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, arguments, named):
        self.tokens += named["input_ids"].numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("model_type", TYPES)
def test_a_known_text_below_a_known_template_is_dense_to_rounding(model_type):
    comm = comm_of(model_type)
    agent = comm.agent("ask", ASK)
    learning, dense = agent.prefill(texts(comm)), agent.prefill(texts(comm), mode="dense")
    filled(comm, agent, 2)
    reused = agent.prefill(texts(comm))
    assert (learning.mode, dense.mode, reused.mode) == ("dense", "dense", "reuse")
    assert largest_above(reused.cache, dense.cache) < 1e-12
    alone = encode(comm.model, reused.ids[:-1])
    assert largest(dense.cache, alone) < 1e-6  # the norms of some types are float32
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    expected = comm.model.generate(**dense.inputs, **options)
    for prefill in (learning, dense, reused):
        assert torch.equal(comm.model.generate(**prefill.inputs, past_key_values=prefill.cache, **options), expected)


@pytest.mark.parametrize("model_type", ["llama", "glm4", "smollm3", "deepseek_v3"])
def test_first_layer_and_first_piece_are_exact_for_any_text(model_type):
    comm = comm_of(model_type)
    agent = filled(comm, comm.agent("ask", ASK))
    reused, dense = agent.prefill(texts(comm), mode="reuse"), agent.prefill(texts(comm), mode="dense")
    for got, expected in zip(cached_states(reused.cache)[0], cached_states(dense.cache)[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # angles of the model are float32
    exact = reused.usage.exact
    for got, expected in zip(cached_states(reused.cache, 0, exact), cached_states(dense.cache, 0, exact), strict=True):
        assert torch.equal(got.key, expected.key)
    assert largest(reused.cache, dense.cache) > 1e-3  # the rest is an estimate


def test_a_text_at_the_beginning_needs_no_estimate():
    comm = comm_of()
    agent = comm.agent("first", "{document}\nEnd.")
    content = comm.content(DOCUMENT)
    states, dense = agent.assemble({"document": content}, {}), agent.prefill({"document": content}, mode="dense")
    for got, expected in zip(states, cached_states(dense.cache), strict=True):
        torch.testing.assert_close(got.key[:, :, : len(content.ids)], expected.key[:, :, : len(content.ids)])


def test_an_anchor_is_worth_the_same_at_another_place():
    """The document moves as the question before it gets longer; alone that is a turn of its deviation."""
    comm = comm_of()
    agent = filled(comm, comm.agent("check", CHECK), 1)
    near, far = (
        agent.assemble({**texts(comm, 5), "question": comm.content(QUESTION + tail)}, {"document": match})
        for tail in ("", "?" * 40)
        for match in [comm.pool.matches(comm.pool.anchors("document"), "check")]
    )
    length = len(texts(comm, 5)["document"].ids)
    begin = len(agent.pieces[0]) + len(QUESTION) + len(agent.pieces[1])
    for layer, rotation in enumerate(comm.rotations.layers):
        moved = rotation.move(near[layer], 40).key[:, :, begin : begin + length]
        torch.testing.assert_close(far[layer].key[:, :, begin + 40 : begin + 40 + length], moved, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- what is done, and why


def test_auto_learns_until_it_can_reuse_and_says_why():
    comm = comm_of(sharpness=None)
    agent = comm.agent("ask", ASK)
    seen = [agent.prefill(texts(comm, number)) for number in (1, 2, 3)]
    assert [prefill.mode for prefill in seen] == ["dense", "dense", "reuse"]
    assert "{document}: no anchor of 34 or more tokens" in seen[0].reason
    assert "{question}: 1 of 2 anchors that this agent needs" in seen[1].reason
    assert seen[0].learned == seen[1].learned == ("document", "question")
    assert seen[2].learned == ()
    assert len(comm.pool) == 4
    assert sum(anchor.uses for anchor in comm.pool.anchors("document")) > 0
    longer = {**texts(comm, 3), "document": comm.content(DOCUMENT * 2)}
    fallback = agent.prefill(longer)
    assert (fallback.mode, fallback.learned) == ("dense", ("document",))
    assert fallback.reason == "{document}: no anchor of 56 or more tokens"


def test_another_agent_learns_its_own_deviations():
    comm = comm_of()
    asking, checking = comm.agent("ask", ASK), comm.agent("check", CHECK)
    asking.prefill(texts(comm))
    first, second = checking.prefill(texts(comm)), checking.prefill(texts(comm))
    assert (first.mode, second.mode) == ("dense", "reuse")
    assert "new to this agent" in first.reason
    assert len(comm.pool) == 2  # the texts were anchors already
    assert largest_above(second.cache, first.cache) < 1e-12


def test_empty_texts_fall_back_by_name():
    comm = comm_of()
    agent = filled(comm, comm.agent("ask", ASK))
    prefill = agent.prefill({"document": DOCUMENT, "question": ""})
    assert (prefill.mode, prefill.reason, prefill.learned) == ("dense", "the text of {question} is empty", ())
    assert largest(prefill.cache, encode(comm.model, prefill.ids[:-1])) < 1e-6
    with pytest.raises(InvalidBatchError, match=r"text of \{question\} is empty"):
        agent.prefill({"document": DOCUMENT, "question": ""}, mode="reuse")


def test_reuse_refuses_instead_of_estimating_without_anchors():
    comm = comm_of()
    agent = comm.agent("ask", ASK)
    with pytest.raises(InvalidBatchError, match=r"no anchor of \{document\} fits agent 'ask' \(no anchor of 34"):
        agent.prefill(texts(comm), mode="reuse")
    agent.prefill(texts(comm, 1))
    assert agent.prefill(texts(comm), mode="reuse").mode == "reuse"
    with pytest.raises(InvalidBatchError, match=r"no anchor of \{question\} fits agent 'check'"):
        comm.agent("check", CHECK).prefill(texts(comm), mode="reuse")


def test_usage_is_what_runs_through_the_model():
    comm = comm_of()
    agent = filled(comm, comm.agent("ask", ASK))
    for number, mode in enumerate(("dense", "auto", "reuse", "blend"), start=10):
        with Counting(comm.model) as count:
            usage = agent.prefill(texts(comm, number), mode=mode).usage
        assert usage.computed + usage.encoded + usage.looked_at == count.tokens
        assert usage.exact == len(agent.pieces[0])
        if mode != "auto":
            assert usage.exact + usage.reused + usage.computed == usage.prompt - 1
        assert (usage.reused > 0) == (mode in ("reuse", "blend"))
    known = texts(comm, 20)
    agent.prefill(known, mode="blend")
    with Counting(comm.model) as count:
        assert agent.prefill(known, mode="reuse").usage.encoded == count.tokens == 0


def test_reuse_repeats_and_a_saved_pool_gives_the_same_bits(tmp_path):
    comm = comm_of()
    agent = filled(comm, comm.agent("ask", ASK))
    first, again = (agent.prefill(texts(comm), mode="reuse") for _ in range(2))
    assert largest(first.cache, again.cache) == 0
    comm.pool.save(tmp_path / "pool.safetensors")
    other = comm_of(pool=AnchorPool.load(tmp_path / "pool.safetensors"))
    assert largest(other.agent("ask", ASK).prefill(texts(other), mode="reuse").cache, first.cache) == 0
    with pytest.raises(InvalidBatchError, match="agent 'ask' with another template"):
        other.agent("ask", ASK + " ")
    with pytest.raises(InvalidBatchError, match="another header"):
        comm_of(pool=AnchorPool.load(tmp_path / "pool.safetensors"), header="Text: ")
    with pytest.raises(InvalidBatchError, match=r"another .*model_type, weights"):
        comm_of("qwen3", pool=AnchorPool.load(tmp_path / "pool.safetensors"))


def test_a_model_that_has_changed_is_refused():
    model = tiny_model("llama", vocab_size=258)
    comm = KVComm(model, byte_tokenizer())
    agent = comm.agent("ask", ASK)
    agent.prefill(texts(comm))
    with pytest.raises(UnsupportedModelError, match="training mode"):
        model.train() and agent.prefill(texts(comm))
    model.eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(InvalidBatchError, match="another weights"):
        agent.prefill(texts(comm))


def test_adapters_belong_to_the_fingerprint():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama", vocab_size=258), peft.LoraConfig(target_modules=["q_proj"])).eval()
    comm = KVComm(model, byte_tokenizer())
    agent = comm.agent("ask", ASK)
    agent.prefill(texts(comm))
    with model.disable_adapter(), pytest.raises(InvalidBatchError, match="another adapters"):
        agent.prefill(texts(comm))
    assert agent.prefill(texts(comm)).mode == "blend"


def test_learned_prefixes_are_refused_when_made_and_later():
    model = attach(tiny_model("llama", vocab_size=258))
    with pytest.raises(UnsupportedModelError, match="learned prefix without keys"):
        KVComm(model, byte_tokenizer())
    with disable_adapter(model):
        agent = KVComm(model, byte_tokenizer()).agent("ask", ASK)
        assert agent.prefill({"document": DOCUMENT, "question": QUESTION}).mode == "dense"
    with pytest.raises(InvalidBatchError, match="another adapters"):
        agent.prefill({"document": DOCUMENT, "question": QUESTION})


def test_threads_share_agents_and_pool():
    comm = comm_of(pool=AnchorPool(max_anchors=4), sharpness=None)
    agents = [comm.agent("ask", ASK), comm.agent("check", CHECK)]
    found, errors = {}, []

    def work(number):
        try:
            for agent in agents:
                for _ in range(2):
                    found[number, agent.name] = agent.prefill(texts(comm, number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(comm.pool) <= 8
    for prefill in found.values():
        assert prefill.cache.get_seq_length() == prefill.usage.prompt - 1


# ---------------------------------------------------------------------- computing some tokens anew


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "glm4", "deepseek_v3", "gptj"])
def test_blend_goes_from_the_estimate_to_dense(model_type):
    comm = comm_of(model_type)
    agent, given = comm.agent("ask", ASK), texts(comm)
    dense = agent.prefill(given, mode="dense")
    off = []
    for share in (0.0, 0.3, 0.7, 1.0):
        comm.config = Config(recompute=share)
        blend = agent.prefill(given, mode="blend")
        assert blend.usage.computed == round(share * (blend.usage.prompt - 1 - blend.usage.exact))
        assert "no anchors of {document}" in blend.reason
        off.append(largest(blend.cache, dense.cache))
    assert off[0] > 1e-3
    assert off[-1] < 1e-6
    assert off[0] > off[2] > off[-1]


def test_the_error_of_the_second_layer_is_true():
    comm = comm_of(max_error=1e9, recompute=0.15)
    agent = comm.agent("ask", ASK)
    given = texts(comm)
    blend, dense = agent.prefill(given, mode="blend"), agent.prefill(given, mode="dense")
    comm.config = Config(recompute=0.0)
    estimate = agent.prefill(given, mode="blend")
    begin = estimate.usage.exact
    got, true = (cached_states(prefill.cache, begin)[1].key[0] for prefill in (estimate, dense))
    off = (got - true).square().sum(dim=(0, 2)).sqrt() / true.square().sum(dim=(0, 2)).sqrt()
    assert estimate.error == pytest.approx(float(off.mean()), rel=1e-5)
    assert blend.error == estimate.error


def test_too_large_an_error_falls_back_learns_and_says_so():
    comm = comm_of()
    agent = filled(comm, comm.agent("ask", ASK), 2)
    comm.config = Config(min_anchors=2, gamma=1.0, max_error=1e-6, recompute=0.0)
    with pytest.raises(InvalidBatchError, match="estimated keys are off by"):
        agent.prefill(texts(comm, 9), mode="reuse")
    prefill = agent.prefill(texts(comm, 9))
    assert prefill.mode == "dense"
    assert "estimated keys are off by" in prefill.reason
    assert prefill.learned == ("document", "question")
    known = agent.prefill(texts(comm, 9))
    assert (known.mode, known.error) == ("reuse", pytest.approx(0, abs=1e-6))


def test_windows_shorter_than_the_prompt_do_not_blend():
    comm = comm_of("mistral")
    agent = comm.agent("ask", ASK)
    with pytest.raises(UnsupportedModelError, match="sliding window of 5"):
        agent.prefill(texts(comm), mode="blend")


def test_chunks_shorter_than_the_prompt_are_refused():
    options = {"attention_chunk_size": 32, "num_local_experts": 2, "moe_layers": [], "vocab_size": 258}
    comm = KVComm(tiny_model("llama4_text", **options), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="attends in chunks of 32"):
        comm.agent("ask", ASK).prefill(texts(comm))


def test_refused_models_are_named():
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        KVComm(tiny_model("gpt2", vocab_size=258), byte_tokenizer())


# ---------------------------------------------------------------------- switches


def estimate(**config):
    comm = comm_of(**config)
    agent = filled(comm, comm.agent("ask", ASK), 2)
    return comm, agent.prefill(texts(comm, 9), mode="reuse")


def test_switches_of_the_estimate_switch():
    _, plain = estimate()
    for config in ({"temperature": 0.01}, {"weighting": "mean"}, {"header": "Text: "}):
        assert largest(estimate(**config)[1].cache, plain.cache) > 1e-4, config


def test_switches_of_the_rule_switch():
    for gamma, modes in ((0.0, ["dense"] * 4), (1.0, ["dense"] * 2 + ["reuse"] * 2)):
        comm = comm_of(gamma=gamma, sharpness=1e-3 if gamma == 0 else 200.0)
        agent = comm.agent("ask", ASK)
        assert [agent.prefill(texts(comm, number)).mode for number in range(4)] == modes
    comm = comm_of(min_anchors=4, gamma=1.0)
    agent = comm.agent("ask", ASK)
    assert [agent.prefill(texts(comm, number)).mode for number in range(6)] == ["dense"] * 4 + ["reuse"] * 2
    comm = comm_of(sharpness=1e-3)
    agent = comm.agent("ask", ASK)
    assert "no anchor stands out (1.00 > 0.3)" in [agent.prefill(texts(comm, n)).reason for n in range(3)][2]


@pytest.mark.parametrize(("top_p", "credited"), [(0.0, 1), (1.0, 2)])
def test_top_p_credits(top_p, credited):
    comm, _ = estimate(top_p=top_p, sharpness=1e-3)
    assert sum(anchor.uses for anchor in comm.pool.anchors("document")) == credited
