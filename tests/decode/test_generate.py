"""`stemma.generate` against `model.generate`: the same tokens; what is refused; handles; reports."""

from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import stemma
from decoders import KINDS, SIZES, V, cached, decoder
from stemma.decode.generate import Config, generate
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.models.limits import check_lengths, dynamic_rope_limit
from stemma.models.tiny import byte_tokenizer, tiny_model

ALWAYS = Config(share="always")
EOS, PAD = 1, 0


def prompts(seed=0):
    """Two groups under a common beginning, one prompt inside another, an equal pair, a prompt of one token."""
    random = np.random.default_rng(seed)

    def run(n):
        return random.integers(2, V, n).tolist()

    head = run(14)
    first, second = head + run(11), head + run(9)
    return [first + run(3), second + run(6), first + run(3), first, head[:5], first, run(1), run(12)]


def plain(model, rows, **options):
    """transformers' own `generate` on left-padded rows."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return model.generate(input_ids=ids, attention_mask=mask, eos_token_id=EOS, pad_token_id=PAD, **options)


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": True, "top_p": 0.8},
}


@pytest.mark.parametrize("sharing", [Config(), ALWAYS], ids=["planned", "always"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_plain_generate(mode, sharing):
    model, rows = cached("llama, grouped queries"), prompts()
    torch.manual_seed(5)
    expected = plain(model, rows, max_new_tokens=12, **MODES[mode])
    torch.manual_seed(5)
    got = generate(
        model, None, rows, max_new_tokens=12, sharing=sharing, eos_token_id=EOS, pad_token_id=PAD, **MODES[mode]
    )
    assert torch.equal(got.output, expected)
    assert (got.report.rectangles > 1) == (sharing is ALWAYS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama, grouped queries"])
def test_tokens_are_those_of_plain_generate_for(kind):
    model = cached(kind)
    if kind.startswith("gemma2"):
        # A soft-cap on logits of this size makes exact ties, which rounding decides; and transformers' own eager
        # attention gives NaN on padding in float64.
        model = decoder(kind, torch.float32, final_logit_softcapping=1e4)
    rows = prompts(1)
    for mode in ("greedy", "beams"):
        expected = plain(model, rows, max_new_tokens=10, **MODES[mode])
        got = generate(
            model, None, rows, max_new_tokens=10, sharing=ALWAYS, eos_token_id=EOS, pad_token_id=PAD, **MODES[mode]
        )
        assert torch.equal(got.output, expected)


def test_every_prompt_token_matters():
    """A token in the middle of the shared run changes what is generated: prefixes are read, not only counted."""
    model, rows = cached("llama, grouped queries"), prompts()
    options = {"max_new_tokens": 12, "sharing": ALWAYS, "eos_token_id": EOS, "pad_token_id": PAD}
    before = generate(model, None, rows, **options).token_ids
    changed = [[*row[:3], (row[3] + 1) % V, *row[4:]] if len(row) > 3 else row for row in rows]
    after = generate(model, None, changed, **options).token_ids
    assert sum(a != b for a, b in zip(before, after)) >= 6


def test_groups_texts_and_ends():
    model, tokenizer = tiny_model(seed=3), byte_tokenizer()
    got = stemma.generate(
        model, tokenizer, ["alpha beta", "alpha gamma"], max_new_tokens=6, num_return_sequences=4, do_sample=True
    )
    assert [len(group) for group in got.token_ids] == [4, 4] == [len(group) for group in got.texts]
    assert got.texts[0][0] == tokenizer.decode(got.token_ids[0][0], skip_special_tokens=True)
    assert not str(model.config._attn_implementation).startswith("stemma")  # enabled for the call only
    ended = generate(
        cached("llama, grouped queries"), None, [[5, 6, 7]], max_new_tokens=40, eos_token_id=list(range(30))
    )
    (row,) = ended.token_ids[0]
    assert row[-1] < 30
    assert all(token >= 30 for token in row[:-1])


def test_chat_messages_take_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    model = tiny_model(seed=3)
    chat = generate(model, tokenizer, [[{"role": "user", "content": "hello"}]], max_new_tokens=5)
    text = generate(model, tokenizer, ["<user>hello<a>"], max_new_tokens=5)
    assert chat.token_ids == text.token_ids


def test_messages_that_no_template_takes_are_refused():
    model, tokenizer, chat = stemma.enable(tiny_model(seed=3)), byte_tokenizer(), [{"role": "user", "content": "hello"}]
    with pytest.raises(
        stemma.InvalidBatchError, match="prompt 0 is chat messages, and the tokenizer has no chat templ"
    ):
        generate(model, tokenizer, [chat], max_new_tokens=5)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(stemma.InvalidBatchError, match=r"messages of prompt 1 \(roles must alternate\)"):
        generate(model, tokenizer, ["a", chat], max_new_tokens=5)
    prefix = stemma.SharedPrefix.from_ids(model, [5, 6])
    with pytest.raises(stemma.InvalidBatchError, match=r"prompt 0 is chat messages, .* cannot follow a prefix"):
        generate(model, tokenizer, [chat], max_new_tokens=5, prefix=prefix)


def test_nothing_is_shared_with_one_row():
    got = generate(cached("llama, grouped queries"), None, [list(range(2, 40))], max_new_tokens=3)
    assert (got.report.rectangles, got.report.shared_bytes, got.report.tail_tokens) == (0, 0, 37)
    assert "nothing shared while decoding" in str(got.report)
    assert got.report.own_bytes == got.report.dense_bytes == 37 * 2 * 2 * 2 * 8 * 8  # like with like


def test_the_report_tells_a_prefix_from_what_the_call_encoded():
    model = cached("llama, grouped queries")
    prefix = stemma.SharedPrefix.from_ids(model, list(range(2, 42)))
    one, two = (
        generate(model, None, rows, max_new_tokens=3, prefix=prefix).report for rows in ([[5, 6]], [[7] * 4] * 2)
    )
    assert (one.row_tokens, one.encoded_tokens, one.prefix_tokens) == (41, 1, 40)
    assert "41 prompt tokens of which 1 were encoded; 40 are the prefix of 40, encoded before" in str(one)
    both = one + two
    assert (both.prompts, both.rows, both.row_tokens, both.encoded_tokens) == (3, 3, 41 + 2 * 43, 1 + 3)
    assert (both.prefix_tokens, both.dense_bytes) == (40, max(one.dense_bytes, two.dense_bytes))


def test_shared_bytes_do_not_grow_with_the_batch():
    model, row = cached("llama, grouped queries"), list(range(2, 60)) * 5
    reports = [
        generate(model, None, [row], max_new_tokens=4, num_return_sequences=n, do_sample=True, sharing=ALWAYS).report
        for n in (2, 16)
    ]
    tokens = len(row) - 1
    assert reports[0].shared_bytes == reports[1].shared_bytes == tokens * 2 * 2 * 2 * 8 * 8  # k, v; layers; heads; D; B
    assert reports[1].dense_bytes == 16 * reports[1].shared_bytes
    assert "1 shared run of" in str(reports[1])


class Steps(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


def test_rows_end_with_their_stop_strings():
    model, tokenizer = tiny_model(seed=3), byte_tokenizer()
    options = {"max_new_tokens": 30, "do_sample": False}
    text = generate(model, tokenizer, ["abcdef"], **options).texts[0][0]
    steps = Steps()
    stopped = generate(
        model, tokenizer, ["abcdef"], stop_strings=text[4:6], logits_processor=LogitsProcessorList([steps]), **options
    )
    assert text.startswith(stopped.texts[0][0])
    assert stopped.texts[0][0].endswith(text[4:6])
    assert steps.calls == len(stopped.token_ids[0][0]) < 30


# ---------------------------------------------------------------------- handles


def checksum(prefix):
    return [(x.double().sum().item(), x._version) for states in prefix.states.values() for x in states]


@pytest.mark.parametrize("kind", ["llama, grouped queries", "mistral, window 5", "gpt_oss, window 5, sinks"])
def test_a_prefix_serves_many_calls_as_if_fresh(kind):
    model, random = cached(kind), np.random.default_rng(3)
    head, middle = random.integers(2, V, 21).tolist(), random.integers(2, V, 10).tolist()
    tails = [random.integers(2, V, n).tolist() for n in (4, 1, 6)]
    first = stemma.SharedPrefix.from_ids(model, head)
    both = first.extend(middle)
    chunked = stemma.SharedPrefix.from_ids(model, head + middle, max_tokens=7)
    before = checksum(first), checksum(both)
    options = {"max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": PAD}
    for prefix, whole in ((first, head), (both, head + middle), (chunked, head + middle)):
        for sharing in (Config(), ALWAYS):
            for _ in range(2):
                got = generate(model, None, tails, prefix=prefix, sharing=sharing, **options)
                assert torch.equal(got.output, plain(model, [whole + tail for tail in tails], max_new_tokens=8))
    assert (checksum(first), checksum(both)) == before
    assert both.above is first
    assert both.nbytes == first.nbytes * 31 // 21


def test_a_prefix_is_read_where_it_lies():
    model = cached("llama, grouped queries")
    prefix = stemma.SharedPrefix.from_ids(model, np.arange(2, 42))
    cache = SharedPrefixCache.of(model, [[5, 6], [7]], prefix=prefix, call_bytes=0)
    read = {x.data_ptr() for runs in cache.states._runs.values() for states in runs for x in states}
    assert {x.data_ptr() for states in prefix.states.values() for x in states} <= read


def test_a_prefix_that_cannot_be_made_or_written_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(stemma.UnsupportedModelError, match=r"call stemma.enable\(model\) first"):
        stemma.SharedPrefix.from_ids(tiny_model(**SIZES), [3, 4, 5])
    prefix = stemma.SharedPrefix.from_ids(cached("llama, grouped queries"), [3, 4, 5])
    (tmp_path / "file").touch()
    with pytest.raises(stemma.InvalidDataError, match="cannot write a prefix"):
        prefix.save_pretrained(tmp_path / "file")
    monkeypatch.setattr("os.replace", mock.Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(stemma.InvalidDataError, match="No space left"):
        prefix.save_pretrained(tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_stale_or_foreign_prefix_is_refused():
    model = decoder()
    prefix = stemma.SharedPrefix.from_ids(model, [3, 4, 5])
    with pytest.raises(stemma.InvalidBatchError, match="encoded by another model"):
        generate(cached("llama, grouped queries"), None, [[7]], max_new_tokens=2, prefix=prefix)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(stemma.InvalidBatchError, match="has changed since"):
        generate(model, None, [[7]], max_new_tokens=2, prefix=prefix)
    with pytest.raises(stemma.InvalidBatchError, match="has changed since"):
        prefix.extend([8])


def test_a_prefix_knows_the_active_adapter():
    peft = pytest.importorskip("peft")
    model = tiny_model(**SIZES, seed=0)
    wrapped = stemma.enable(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)))
    wrapped.eval()
    prefix = stemma.SharedPrefix.from_ids(wrapped, [3, 4, 5])
    generate(wrapped, None, [[7]], max_new_tokens=2, prefix=prefix)
    with wrapped.disable_adapter(), pytest.raises(stemma.InvalidBatchError, match="active adapters"):
        generate(wrapped, None, [[7]], max_new_tokens=2, prefix=prefix)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([], {}, stemma.InvalidBatchError, "no prompts"),
        ([[5], []], {}, stemma.InvalidBatchError, "prompt 1 is empty"),
        (["text"], {}, stemma.InvalidBatchError, "needs a tokenizer"),
        ([["a", "b"]], {}, stemma.InvalidBatchError, "prompt 0 must be a text"),
        ([[V]], {}, stemma.InvalidBatchError, "outside the model's vocabulary"),
        ([[-1, 2]], {}, stemma.InvalidBatchError, "row 0"),
        ([[5] * 510], {"max_new_tokens": 3}, stemma.InvalidBatchError, "513 tokens"),
        ([[5]], {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ([[5]], {"past_key_values": object()}, ValueError, "past_key_values"),
        ([[5]], {"assistant_model": object()}, ValueError, "assisted"),
        ([[5]], {"cache_implementation": "static"}, ValueError, "two caches"),
        ([[5]], {"cache_implementation": "quantized"}, ValueError, "two caches"),
        ([[5]], {"use_cache": False}, ValueError, "leaves nothing to share"),
        ([[5]], {"output_attentions": True}, stemma.UnsupportedModelError, "attention weights"),
        ([[5]], {"no_such_option": 1}, ValueError, "no_such_option"),
        ("Hello", {}, stemma.InvalidBatchError, r"prompts is a list of prompts; write \[prompt\]"),
        ([{"role": "user", "content": "hi"}], {}, stemma.InvalidBatchError, r"write \[prompt\]"),
        ({"input_ids": [[5]]}, {}, stemma.InvalidBatchError, r"write \[prompt\]"),
        ([5, 6], {}, stemma.InvalidBatchError, r"write \[prompt\]"),
        (torch.tensor([5, 6]), {}, stemma.InvalidBatchError, r"write \[prompt\]"),
        ([[5.7, 6.2]], {}, stemma.InvalidBatchError, "prompt 0 must be a text, a list of token ids"),
        ([torch.tensor([5.0])], {}, stemma.InvalidBatchError, "prompt 0 must be a text, a list of token ids"),
        ([[5], 6], {}, stemma.InvalidBatchError, "prompt 1 must be a text"),
        ([[5], {"prompt": "a"}], {}, stemma.InvalidBatchError, "prompt 1 must be a text"),
        ([[5]], {"prefix": "text"}, stemma.InvalidBatchError, "prefix must be a SharedPrefix, got str"),
        ([[5]], {"sharing": "always"}, ValueError, "sharing must be a Config, got 'always'"),
        ([[5]], {"top_p": 0.9}, ValueError, "top_p=0.9 is of sampling"),
        ([[5]], {"top_k": 5, "do_sample": False}, ValueError, "top_k=5 is of sampling"),
        ([[5]], {"temperature": 0.7}, ValueError, "temperature=0.7 is of sampling"),
    ],
)
def test_refusals(rows, options, error, words):
    model = cached("llama, grouped queries")
    with pytest.raises(error, match=words):
        generate(model, None, rows, **{"max_new_tokens": 4} | options)


def test_rotary_frequencies_that_change_with_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = stemma.enable(tiny_model(**SIZES, rope_parameters=rope), self_test=False)
    check_lengths(model, dynamic_rope_limit(model))
    model.config.max_position_embeddings = 4096
    with (
        mock.patch("stemma.models.limits.dynamic_rope_limit", return_value=512),
        pytest.raises(stemma.InvalidBatchError, match="rotary frequencies"),
    ):
        generate(model, None, [[5] * 500], max_new_tokens=13)


def test_active_dropout_is_refused():
    model = stemma.enable(tiny_model(**SIZES, attention_dropout=0.1)).train()
    with pytest.raises(stemma.UnsupportedModelError, match="dropout"):
        generate(model, None, [[5, 6, 7]], max_new_tokens=2)


def test_a_model_that_cannot_share_is_refused_by_name_and_left_alone():
    model = tiny_model("bloom", vocab_size=V)
    with pytest.raises(stemma.UnsupportedModelError, match="Bloom"):
        generate(model, None, [[5, 6]], max_new_tokens=2)
    expected = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    got = generate(model, None, [[5, 6]], max_new_tokens=4, sharing=Config(share="never"), pad_token_id=PAD)
    assert torch.equal(got.output, expected)
    assert got.report is None


@pytest.mark.parametrize("options", [{"share": "sometimes"}, {"min_shared": 0}, {"min_shared": 1.5}, {"max_tokens": 0}])
def test_config_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)
