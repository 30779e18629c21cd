"""Just read twice, with the tools of transformers: Trainer, collators, padding, workers and caches."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DynamicCache, GenerationConfig, Trainer, TrainingArguments

from stemma.errors import InvalidBatchError, InvalidDataError, UnsupportedModelError
from stemma.models.tiny import byte_tokenizer
from stemma.pretrain.jrt import PrefixLinearAttentionConfig, PrefixLinearAttentionForCausalLM, PrefixLMCollator

VOCAB, PAD, MASK = 40, 38, 39


def model(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "feature_dim": 3, "prefix_length": 4}
    mixers = ["conv", "prefix_linear", "sliding"]
    config = PrefixLinearAttentionConfig(
        mixer_types=mixers, initializer_range=0.3, **{"vocab_size": VOCAB} | sizes | changes
    )
    return PrefixLinearAttentionForCausalLM(config).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(1, PAD, shape, generator=torch.Generator().manual_seed(seed))


def collator(**changes):
    return PrefixLMCollator(**{"pad_token_id": PAD, "mask_token_id": MASK, "prefix_length": 4} | changes)


def examples(*lengths):
    return [{"input_ids": tokens(n, seed=n).tolist()} for n in lengths]


def trainer(folder, m, collate, rows, **changes):
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    arguments = TrainingArguments(str(folder), max_steps=2, report_to=[], use_cpu=True, **sizes | changes)
    return Trainer(m, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def test_the_trainer_evaluates_and_predicts(tmp_path):
    rows = examples(5, 7, 9, 6)
    m = model().float()
    loop = trainer(tmp_path, m, collator(mlm_probability=0.0), rows, eval_strategy="steps", eval_steps=1)
    loop.train()
    evaluated = [entry["eval_loss"] for entry in loop.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    expected = [m.eval()(**collator(mlm_probability=0.0)(rows[i : i + 2])).loss.item() for i in (0, 2)]
    assert loop.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    predicted = loop.predict(rows)
    assert predicted.predictions.shape == (4, 9, VOCAB)
    assert predicted.label_ids.shape == (4, 9)


def test_labels_that_the_prefix_shows_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [{"input_ids": tokenizer.encode("The dial turned left.")} for _ in range(2)]
    m = model(vocab_size=len(tokenizer)).float()
    with pytest.raises(InvalidBatchError, match=r"8 of them equal the token that the input shows.*PrefixLMCollator"):
        trainer(tmp_path, m, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows).train()

    ids = tokens(1, 9)
    hidden, labels = ids.clone(), ids.clone()
    hidden[:, :4] = MASK
    assert model()(hidden, labels=ids).loss > 0
    labels[:, :4] = -100
    assert model()(ids, labels=labels).loss > 0
    assert model()(ids, labels=ids, prefix_lengths=torch.tensor([0])).loss > 0
    with pytest.raises(InvalidBatchError, match=r"labels must be one for each of input_ids, \(1, 9\), got \(1, 8\)"):
        model()(ids, labels=ids[:, 1:])


def test_texts_may_hold_the_mask_token():
    batch = collator(mlm_probability=1.0)([{"input_ids": [5, MASK, 6, 7, 8, MASK]}])
    assert batch["input_ids"].tolist() == [[MASK, MASK, MASK, 7, 8, MASK]]
    assert batch["labels"].tolist() == [[5, -100, 6, -100, 8, MASK]]
    assert model()(**batch).loss > 0


def test_labels_are_scored_without_a_cache():
    m, batch = model(), collator()(examples(5, 9))
    out = m(**batch)
    assert out.past_key_values is None
    assert out.loss == m(**batch, use_cache=False).loss == m.train()(**batch).loss
    with pytest.raises(InvalidBatchError, match="give use_cache=False"):
        m.eval()(**batch, use_cache=True)
    ids = tokens(2, 6)
    assert m(ids, labels=ids - 1, use_cache=True).past_key_values.get_seq_length() == 6


@pytest.mark.parametrize("prefix", [0, 3])
def test_the_side_of_padding_does_not_change_the_loss(prefix):
    m, ids, lengths = model(), tokens(1, 7), torch.tensor([prefix])
    labels = ids.clone()
    labels[:, :prefix] = -100
    alone = m(ids, labels=labels, prefix_lengths=lengths).loss
    for padding in ((0, 4), (4, 0)):
        padded = [torch.nn.functional.pad(x, padding, value=fill) for x, fill in ((ids, PAD), (labels, -100))]
        mask = (padded[0] != PAD).long()
        loss = m(padded[0], attention_mask=mask, labels=padded[1], prefix_lengths=lengths).loss
        torch.testing.assert_close(loss, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["call", "settings", "model"])
def test_padding_that_generate_infers_is_no_part_of_the_prefix(where):
    m, ids = model(prefix_length=100), tokens(2, 9)
    ids[0, :6] = PAD
    mask = (ids != PAD).long()
    call = {"max_new_tokens": 8, "do_sample": False}
    expected = m.generate(ids, attention_mask=mask, pad_token_id=PAD, **call)
    if where == "call":
        call["pad_token_id"] = PAD
    elif where == "settings":
        call = {"generation_config": GenerationConfig(pad_token_id=PAD, **call)}
    else:
        m.generation_config.pad_token_id = PAD
    for use_cache in (True, False):
        if where == "settings":
            call["generation_config"].use_cache = use_cache
        else:
            call["use_cache"] = use_cache
        assert torch.equal(m.generate(ids, **call), expected)


def test_an_id_that_ends_texts_is_not_taken_for_padding():
    m, ids = model(prefix_length=100), tokens(2, 9)
    ids[0, 3] = PAD  # a text that ended, and went on
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": [1, PAD]}
    whole = m.generate(ids, attention_mask=torch.ones_like(ids), **call)
    assert torch.equal(m.generate(ids, **call), whole)
    with pytest.raises(InvalidBatchError, match="give such an attention_mask"):
        m.generate(ids, **call | {"eos_token_id": 1})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, InvalidBatchError, "at least one token, got NoneType"),
        ({"input_ids": tokens(2, 0)}, InvalidBatchError, r"at least one token, got \(2, 0\)"),
        ({"inputs": [[1, 2]]}, InvalidBatchError, "a tensor .* got list"),
        ({"inputs": tokens(1, 3), "past_key_values": DynamicCache()}, UnsupportedModelError, "is a DynamicCache, but"),
        (
            {"inputs": tokens(1, 3), "attention_mask": torch.tensor([[1, 1, 0]]), "use_cache": False},
            InvalidBatchError,
            "padding_side='left'",
        ),
    ],
)
def test_what_generate_cannot_begin_with_is_named(call, error, message):
    with pytest.raises(error, match=message):
        model().generate(max_new_tokens=2, pad_token_id=PAD, **call)


def test_a_cache_of_keys_and_values_is_named():
    with pytest.raises(UnsupportedModelError, match="leave it out for a new cache"):
        model()(tokens(1, 3), past_key_values=DynamicCache())


def test_earlier_padding_gets_no_loss():
    row = {"input_ids": [PAD, PAD, 5, 6, 7, 8, PAD], "attention_mask": [0, 0, 1, 1, 1, 1, 0]}
    plain = {"input_ids": [5, 6, 7, 8]}
    for changes in ({}, {"prefix_lengths": 2}, {"labels": [-100, -100, 5, 6, 7, -100, -100]}):
        own = changes | ({"labels": [5, 6, 7, -100]} if "labels" in changes else {})
        padded, expected = (collator(prefix_length=1)([example]) for example in (row | changes, plain | own))
        assert all(torch.equal(padded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mask", [[0, 0], [1, 1, 1]])
def test_masks_of_examples_are_checked(mask):
    with pytest.raises(InvalidDataError, match="example 0 has 2 tokens"):
        collator()([{"input_ids": [5, 6], "attention_mask": mask}])


@pytest.mark.parametrize("workers", [1, 2])
def test_masks_of_workers_differ_between_epochs_and_repeat_with_torchs_seed(workers):
    def epochs():
        torch.manual_seed(3)
        rows = [{"input_ids": list(range(1, 31))}] * 2
        loader = DataLoader(rows, num_workers=workers, collate_fn=collator(prefix_length=30, mlm_probability=0.5))
        return [batch["input_ids"] for _ in range(2) for batch in loader]

    first, again = epochs(), epochs()
    assert all(map(torch.equal, first, again))
    assert len({tuple(ids.flatten().tolist()) for ids in first}) == 4
