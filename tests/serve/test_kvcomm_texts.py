"""What KVCOMM is given: settings, templates, joins that are the tokens of the text, answers handed on as tokens."""

import pytest
import torch

from stemma.errors import InvalidBatchError
from stemma.models.rotary import cached_states, encode
from stemma.models.tiny import byte_tokenizer, tiny_model, train_tokenizer
from stemma.serve.kvcomm import Config, KVComm, Template

TEXT = "the dog and the cat and the other dog sat in the sun\n" * 20


def comm_of(tokenizer=None, **options):
    tokenizer = tokenizer or byte_tokenizer()
    return KVComm(tiny_model("llama", vocab_size=320, dtype=torch.float64, **options), tokenizer)


def test_templates_are_read():
    template = Template.parse("Use {{braces}}.\n{a}{b}\nEnd")
    assert (template.pieces, template.names) == (("Use {braces}.\n", "", "\nEnd"), ("a", "b"))
    assert Template.parse("{question}").pieces == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no placeholder", "has no placeholder"),
        ("{a} {a}", r"has \{a\} twice"),
        ("{}", r"written \{name\}, got \{\}"),
        ("{a:>3}", r"got \{a:>3\}"),
        ("{a!r}", r"got \{a!r\}"),
        ("a } b", "cannot be read"),
    ],
)
def test_templates_that_are_none(text, message):
    with pytest.raises(InvalidBatchError, match=message):
        Template.parse(text)


def test_texts_must_be_those_of_the_template():
    comm = comm_of()
    agent = comm.agent("a", "Q: {question}\nA:")
    with pytest.raises(InvalidBatchError, match="'question' is missing"):
        agent.prefill({})
    with pytest.raises(InvalidBatchError, match="'other' is unknown"):
        agent.prefill({"question": "x", "other": "y"})
    with pytest.raises(InvalidBatchError, match="a text is expected, got int"):
        agent.prefill({"question": 3})
    with pytest.raises(ValueError, match="mode must be"):
        agent.prefill({"question": "x"}, mode="lazy")
    with pytest.raises(InvalidBatchError, match="the model has 512 positions"):
        agent.prefill({"question": "x" * 600})


def test_parts_must_join_to_the_tokens_of_the_text():
    tokenizer = train_tokenizer([TEXT], 300)
    comm = comm_of(tokenizer)
    good = comm.agent("good", "Read.\n{text}\nDone").prefill({"text": "the dog"})
    assert good.ids == tokenizer("Read.\nthe dog\nDone")["input_ids"]
    with pytest.raises(InvalidBatchError, match=r"beginning and the text of \{text\} joined .*'Say th' \+ 'e dog'"):
        comm.agent("bad", "Say th{text}\nDone").prefill({"text": "e dog"})
    with pytest.raises(InvalidBatchError, match=r"text of \{text\} and what follows \{text\} joined"):
        comm.agent("worse", "Read.\n{text}og and").prefill({"text": "the cat and the d"})


def test_the_tokenizers_first_tokens_stand_before_prompt_and_bases():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 256)])
    tokenizer.backend_tokenizer.post_processor = processor
    comm = comm_of(tokenizer)
    assert comm.header == (256,)
    agent = comm.agent("a", "{text} end")
    prefill = agent.prefill({"text": "some text"})
    assert prefill.ids == tokenizer("some text end")["input_ids"]
    assert prefill.ids[0] == 256
    states, dense = agent.assemble({"text": comm.content("some text")}, {}), cached_states(prefill.cache)
    torch.testing.assert_close(states[1].key[:, :, :10], dense[1].key[:, :, :10])  # below the same first token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 256)])
    behind = comm_of(tokenizer)
    assert behind.header == ()
    assert bytes(behind.agent("b", "x{text} end").prefill({"text": "some text"}).ids) == b"xsome text end"


def test_chat_messages():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    comm = comm_of(tokenizer)
    messages = [{"role": "system", "content": "Help {{kindly}}."}, {"role": "user", "content": "{question}?"}]
    prefill = comm.agent("chat", messages).prefill({"question": "Why"})
    rendered = [{"role": "system", "content": "Help {kindly}."}, {"role": "user", "content": "Why?"}]
    assert prefill.ids == tokenizer.apply_chat_template(rendered, add_generation_prompt=True, return_dict=False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InvalidBatchError, match=r"does not keep placeholder \{question\}"):
        comm.agent("lost", messages)


@pytest.mark.parametrize("stop", ["length", "tokenizer", "generation config"])
def test_an_answer_is_handed_on_as_tokens_with_its_states(stop):
    comm = comm_of()
    asking, checking = comm.agent("ask", "Q: {question}\nA:"), comm.agent("check", "He said\n{answer}\nRight?")
    prefill = asking.prefill({"question": "How many?"})
    row = comm.model.generate(
        **prefill.inputs, past_key_values=prefill.cache, max_new_tokens=5, do_sample=False, eos_token_id=None,
        pad_token_id=257,
    )  # fmt: skip
    if stop != "length":
        row[0, -1] = 256 if stop == "tokenizer" else 7
        comm.model.generation_config.eos_token_id = [5, 7]
    answer = asking.answer(prefill, row)
    kept = row[0, len(prefill.ids) :].tolist()[: 5 if stop == "length" else 4]
    assert (answer.ids, answer.origin, answer.text) == (tuple(kept), "generated", None)
    whole = cached_states(encode(comm.model, [*prefill.ids, *kept]), len(prefill.ids))
    back = comm.rotations.move(answer.base, len(prefill.ids) - len(comm.header))
    for got, expected in zip(back, whole, strict=True):
        torch.testing.assert_close(got.key, expected.key, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-6)
    first, again = checking.prefill({"answer": answer}), checking.prefill({"answer": answer}, mode="reuse")
    assert first.ids == [*b"He said\n", *kept, *b"\nRight?"]
    assert (first.mode, first.usage.encoded, again.mode) == ("dense", 0, "reuse")
    assert comm.pool.anchors("answer")[0].origin == "generated"
    for got, expected in zip(cached_states(again.cache), cached_states(first.cache), strict=True):
        torch.testing.assert_close(got.key, expected.key, rtol=0, atol=1e-6)  # the first layer has float32 angles


def test_answers_that_are_none():
    comm = comm_of()
    agent = comm.agent("ask", "Q: {question}\nA:")
    prefill = agent.prefill({"question": "How?"})
    with pytest.raises(InvalidBatchError, match="does not begin with the prompt"):
        agent.answer(prefill, [1, 2, 3])
    with pytest.raises(InvalidBatchError, match="nothing was generated with this cache"):
        agent.answer(prefill, prefill.ids)
    with pytest.raises(InvalidBatchError, match="nothing was generated with this cache"):
        agent.answer(prefill, [*prefill.ids, 5, 6, 7])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"gamma": -0.1}, {"gamma": 1.1}, {"top_p": 2.0}, {"recompute": -1.0}, {"temperature": 0.0}),
        *({"sharpness": 0.0}, {"max_error": -1.0}, {"weighting": "max"}, {"min_anchors": 0}),
    ],
)
def test_settings_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        Config(**wrong)
