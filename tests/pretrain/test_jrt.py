"""Just read twice: prompts that keep their question, a model whose forms agree, a loss that skips nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from stemma.errors import InvalidBatchError, InvalidDataError, UnsupportedModelError
from stemma.models.tiny import byte_tokenizer
from stemma.prefix.tree import PrefixTree
from stemma.pretrain.jrt import (
    Config,
    PrefixLinearAttentionConfig,
    PrefixLinearAttentionForCausalLM,
    PrefixLMCollator,
    jrt_ids,
    jrt_messages,
    jrt_text,
    prefix_lm_loss,
)

VOCAB = 40
EVERY = ["conv", "prefix_linear", "sliding", "linear"]


def model(mixers=EVERY, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "feature_dim": 3}
    config = PrefixLinearAttentionConfig(
        vocab_size=VOCAB, mixer_types=mixers, sliding_window=4, chunk_size=3, initializer_range=0.3, **sizes | changes
    )
    return PrefixLinearAttentionForCausalLM(config).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# --- JRT-Prompt


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(), "a b\na b q?"),
        (Config(repeats=1), "a b q?"),
        (Config(repeats=3, question_first=True), "q? a b\na b\na b q?"),
    ],
)
def test_layout_of_a_text(config, expected):
    assert jrt_text("a b", ["q?"], config=config) == [expected]
    assert jrt_messages("a b", ["q?"], config=config)[0][-1] == {"role": "user", "content": expected}


@given(
    context=st.text(st.sampled_from("ab €\n"), max_size=40),
    questions=st.lists(st.text("xyz", min_size=1, max_size=6), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    first=st.booleans(),
    budget=st.integers(1, 90),
)
def test_a_budget_shortens_all_copies_alike_and_never_the_question(context, questions, repeats, first, budget):
    tokenizer = byte_tokenizer()
    config = Config(repeats=repeats, question_first=first, max_tokens=budget)

    def whole(kept):
        return jrt_text(context[:kept], questions, config=Config(repeats=repeats, question_first=first))

    def size(kept):
        return max(len(tokenizer(text)["input_ids"]) for text in whole(kept))

    fitting = [kept for kept in range(len(context) + 1) if size(kept) <= budget]
    if not fitting or (context and fitting == [0]):
        with pytest.raises(InvalidBatchError, match=f"max_tokens is {budget}"):
            jrt_text(context, questions, config=config, tokenizer=tokenizer)
    else:
        assert jrt_text(context, questions, config=config, tokenizer=tokenizer) == whole(fitting[-1])


def test_a_budget_of_a_chat_counts_its_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    before = [{"role": "system", "content": "S"}]
    (chat,) = jrt_messages("c" * 50, ["why?"], config=Config(max_tokens=60), tokenizer=tokenizer, before=before)
    assert chat[0] == before[0]
    assert len("<system>S<user><bot>") + len(chat[1]["content"]) in (59, 60)  # one more character is two
    first, rest = chat[1]["content"].split("\n")
    assert rest == first + " why?"
    with pytest.raises(InvalidBatchError, match="without any of its context"):
        jrt_messages("c" * 50, ["why?"], config=Config(max_tokens=25), tokenizer=tokenizer, before=before)


def test_ids_repeat_shorten_and_share_their_copies():
    context, questions = list(range(10, 30)), [[1, 2], [3], [4, 5, 6]]
    prompts = jrt_ids(context, questions, separator=[9])
    assert prompts[1] == [*context, 9, *context, 3]
    assert PrefixTree.from_sequences(prompts).unique_tokens == 41 + 2 + 1 + 3
    first = jrt_ids(context, questions, config=Config(question_first=True))
    assert PrefixTree.from_sequences(first).unique_tokens == sum(map(len, first))
    short = jrt_ids(context, questions, config=Config(max_tokens=13), separator=[9])
    assert short[0] == [10, 11, 12, 13, 9, 10, 11, 12, 13, 1, 2]
    assert max(map(len, short)) == 12
    with pytest.raises(InvalidBatchError, match="4 tokens without any"):
        jrt_ids(context, questions, config=Config(max_tokens=5), separator=[9])


@pytest.mark.parametrize(("field", "value"), [("repeats", 0), ("max_tokens", 0)])
def test_settings_of_a_prompt_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        Config(**{field: value})


def test_what_a_budget_needs_is_asked_for():
    with pytest.raises(ValueError, match="give the tokenizer"):
        jrt_text("a", ["b"], config=Config(max_tokens=9))
    with pytest.raises(ValueError, match="give the tokenizer"):
        jrt_messages("a", ["b"], config=Config(max_tokens=9))
    for questions in ([], "one text"):
        for function, context in ((jrt_text, "a"), (jrt_messages, "a"), (jrt_ids, [1])):
            with pytest.raises(InvalidBatchError, match="at least one question"):
                function(context, questions)


# --- the model


@pytest.mark.parametrize("mixer", EVERY)
def test_decoding_after_a_prefill_is_one_long_forward(mixer):
    m, ids, lengths = model([mixer, "conv"]), tokens(2, 11), torch.tensor([3, 5])
    whole = m(ids, prefix_lengths=lengths, use_cache=False).logits
    out = m(ids[:, :5], prefix_lengths=lengths)
    parts = [out.logits]
    for piece in (ids[:, 5:6], ids[:, 6:9], ids[:, 9:10], ids[:, 10:11]):
        out = m(piece, past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_the_state_does_not_grow_with_the_text():
    m = model()
    sizes = [m(tokens(2, length)).past_key_values.num_bytes() for length in (8, 80)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_lengths_are_of_each_row(side):
    m, rows, lengths = model(), [tokens(1, n, seed=n) for n in (4, 9, 6)], torch.tensor([2, 9, 0])
    alone = [m(row, prefix_lengths=lengths[[i]], use_cache=False).logits[0] for i, row in enumerate(rows)]
    batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    where = [slice(9 - row.shape[1], 9) if side == "left" else slice(0, row.shape[1]) for row in rows]
    for i, row in enumerate(rows):
        batch[i, where[i]], mask[i, where[i]] = row[0], 1
    logits = m(batch, attention_mask=mask, prefix_lengths=lengths, use_cache=False).logits
    for i, expected in enumerate(alone):
        torch.testing.assert_close(logits[i, where[i]], expected, rtol=0, atol=1e-12)


def test_the_future_shows_in_the_prefix_only():
    m, ids = model(["conv", "prefix_linear", "prefix_linear"]), tokens(1, 8)
    x = m.embed_tokens(ids).detach().requires_grad_()
    m.embed_tokens.forward = lambda _: x
    logits = m(ids, prefix_lengths=torch.tensor([4]), use_cache=False).logits
    for i in range(8):
        (grad,) = torch.autograd.grad(logits[0, i].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).tolist() == [j <= max(i, 3) for j in range(8)]


def test_without_a_prefix_it_is_the_causal_model():
    m, causal = model(["conv", "prefix_linear"]), model(["conv", "linear"])
    causal.load_state_dict(m.state_dict(), strict=False)
    ids, none = tokens(2, 7), torch.zeros(2, dtype=torch.long)
    assert torch.equal(m(ids, prefix_lengths=none).logits, causal(ids).logits)
    assert (m(ids, prefix_lengths=none + 3).logits - causal(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}])
def test_generate_with_states_is_generate_without(options):
    m, ids, mask = model(), tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(
            m.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, pad_token_id=0, **options)
        )
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == 11


def test_generate_reads_every_token_once():
    m, seen = model(), []
    m.embed_tokens.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape[1]))
    m.generate(tokens(1, 6), max_new_tokens=4, pad_token_id=0)
    assert seen == [6, 1, 1, 1]


def test_saved_and_loaded_it_answers_the_same(tmp_path):
    m, ids = model(prefix_length=3), tokens(2, 7)
    m.save_pretrained(tmp_path)
    for kind in (PrefixLinearAttentionForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path, dtype=torch.float64)
        assert loaded.config.mixer_types == EVERY
        assert torch.equal(loaded(ids).logits, m(ids).logits)


def test_recomputing_layers_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        m = model().train()
        if recompute:
            m.gradient_checkpointing_enable()
        m(tokens(2, 8), labels=tokens(2, 8) - 1, prefix_lengths=torch.tensor([4, 5])).loss.backward()
        grads.append([p.grad for p in m.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_step_lowers_the_loss():
    m = model().float().train()
    collator = PrefixLMCollator(pad_token_id=0, mask_token_id=VOCAB - 1, prefix_length=6)
    batch = collator([{"input_ids": row.tolist()} for row in tokens(8, 12)])
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(m(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_the_trainer_of_transformers_trains_it(tmp_path):
    m = model().float()
    before = [p.clone() for p in m.parameters()]
    collator = PrefixLMCollator(pad_token_id=0, mask_token_id=VOCAB - 1, prefix_length=4)
    rows = [{"input_ids": tokens(n, seed=n).tolist(), "prefix_lengths": n // 2} for n in (5, 7, 9, 6)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    result = Trainer(m, arguments, train_dataset=rows, data_collator=collator).train()
    assert 0 < result.training_loss < 20
    assert all(not torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prefix_lengths": torch.tensor([1])}, "one whole number"),
        ({"prefix_lengths": torch.tensor([1, -1])}, "one whole number"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "padding must be on the left"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]), "use_cache": False}, "at least one token"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, "one run"),
        ({"attention_mask": torch.ones(2, 2)}, "a column for each of 3 tokens"),
    ],
)
def test_what_makes_no_batch_is_refused(call, message):
    with pytest.raises(InvalidBatchError, match=message):
        model()(tokens(2, 3), **call)


def test_a_state_cannot_be_cut():
    cache = model()(tokens(1, 3)).past_key_values
    with pytest.raises(UnsupportedModelError, match="cannot forget"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["mamba"]}, "mixer_types must be among"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "multiple of twice"),
        ({"prefix_length": -1}, "prefix_length must be at least 0"),
        ({"conv_kernel": 1}, "conv_kernel must be at least 2"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"feature_dim": 0}, "feature_dim must be at least 1"),
    ],
)
def test_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        PrefixLinearAttentionConfig(**changes)


# --- the objective


def test_the_loss_is_its_sums_written_out():
    logits, prefix = torch.randn(2, 5, VOCAB, dtype=torch.float64), torch.arange(5) < torch.tensor([[3], [0]])
    labels = torch.tensor([[7, -100, 0, 4, 0], [1, 2, -100, 3, 9]])
    logp = logits.log_softmax(-1)
    masked = [logp[0, 0, 7], logp[0, 2, 0]]  # id 0 is a token like others
    ahead = [logp[0, 2, 4], logp[0, 3, 0], logp[1, 0, 2], logp[1, 2, 3], logp[1, 3, 9]]
    expected = -sum(ahead) / 5 - 0.25 * sum(masked) / 2
    torch.testing.assert_close(prefix_lm_loss(logits, labels, prefix), expected, rtol=0, atol=1e-12)


def test_a_mean_of_nothing_is_zero():
    logits, labels = torch.randn(1, 4, VOCAB, requires_grad=True), torch.full((1, 4), -100)
    loss = prefix_lm_loss(logits, labels, torch.ones(1, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    prefix=st.integers(0, 14),
    probability=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_labels_are_masked_tokens_and_those_behind_the_prefix(lengths, prefix, probability):
    collator = PrefixLMCollator(pad_token_id=0, mask_token_id=99, prefix_length=prefix, mlm_probability=probability)
    rows = [tokens(n, seed=n).tolist() for n in lengths]
    batch = collator([{"input_ids": row} for row in rows])
    for i, row in enumerate(rows):
        end = min(prefix, len(row))
        assert batch["prefix_lengths"][i] == end
        ids, labels = batch["input_ids"][i].tolist(), batch["labels"][i].tolist()
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * (len(ids) - len(row))
        assert ids[end : len(row)] == labels[end : len(row)] == row[end:]
        assert set(labels[len(row) :]) <= {-100}
        for j in range(end):
            assert (ids[j], labels[j]) in ((row[j], -100), (99, row[j]))
        if probability != 0.5:
            keep = max(end - 1, 0) if end < len(row) else end
            assert [x == 99 for x in ids[:keep]] == [probability == 1.0] * keep
        if 0 < end < len(row):
            assert ids[end - 1] == row[end - 1]


def test_masks_repeat_with_the_seed_and_differ_between_calls():
    def batches(seed):
        collator = PrefixLMCollator(pad_token_id=0, mask_token_id=99, prefix_length=50, mlm_probability=0.5, seed=seed)
        return [collator([{"input_ids": list(range(1, 60))}])["input_ids"] for _ in range(2)]

    (a, b), (c, d) = batches(0), batches(0)
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)
    assert not torch.equal(a, batches(1)[0])


def test_examples_bring_their_own_prefix_and_labels():
    collator = PrefixLMCollator(pad_token_id=0, mask_token_id=99, prefix_length=9, mlm_probability=0.0)
    batch = collator([{"input_ids": [5, 6, 7, 8], "prefix_lengths": 2, "labels": [5, 6, -100, 8]}])
    assert batch["labels"].tolist() == [[-100, -100, -100, 8]]
    assert batch["prefix_lengths"].tolist() == [2]


@pytest.mark.parametrize("example", [{"input_ids": []}, {"input_ids": [1, 2], "labels": [1]}])
def test_examples_are_checked(example):
    with pytest.raises(InvalidDataError, match="example 1 has"):
        PrefixLMCollator(pad_token_id=0, mask_token_id=99, prefix_length=9)([{"input_ids": [1]}, example])


@pytest.mark.parametrize(("field", "value"), [("prefix_length", -1), ("mlm_probability", 1.5)])
def test_settings_of_the_collator_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        PrefixLMCollator(**{"pad_token_id": 0, "mask_token_id": 1, "prefix_length": 1, field: value})
