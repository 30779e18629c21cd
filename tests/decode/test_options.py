"""Options of `stemma.generate`: merged as transformers merges them, and refused before anything is encoded."""

import math
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig, StoppingCriteria

import stemma
from decoders import SIZES, cached
from stemma.decode.generate import Config, generate
from stemma.decode.prompts import prompt_ids
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.models.adapter import is_enabled
from stemma.models.tiny import byte_tokenizer, tiny_model

ALWAYS, NEVER = Config(share="always"), Config(share="never")
ROWS = [[104, 101, 108, 108, 111, 32, 97], [104, 101, 108, 108, 111, 32, 98]]


@pytest.fixture
def model():
    made = tiny_model("llama", vocab_size=258, dtype=torch.float64)
    made.generation_config.pad_token_id = 0
    return stemma.enable(made, self_test=False)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def plain(model, **options):
    """transformers' own tokens."""
    ids = torch.tensor(ROWS)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)


def both(model, tokenizer, sharing=ALWAYS, **options):
    torch.manual_seed(3)
    expected = plain(model, **options)
    torch.manual_seed(3)
    got = generate(model, tokenizer, ROWS, max_new_tokens=12, sharing=sharing, **options)
    return got, expected


def second_token(model):
    """What the first row says second, once."""
    tokens = plain(model, do_sample=False)[0, len(ROWS[0]) :].tolist()
    return tokens[1]


# ---------------------------------------------------------------------- merged configs


def test_a_config_leaves_the_models_own_end_of_sequence(model, tokenizer):
    end = second_token(model)
    model.generation_config.eos_token_id = [end]
    got, expected = both(model, tokenizer, generation_config=GenerationConfig(do_sample=False))
    assert torch.equal(got.output, expected)
    assert got.token_ids[0][0][-1] == end
    assert len(got.token_ids[0][0]) <= 2


def test_none_switches_an_option_off(model, tokenizer):
    end = second_token(model)
    model.generation_config.eos_token_id = end
    for given in (None, GenerationConfig(do_sample=False)):
        got, expected = both(model, tokenizer, eos_token_id=None, generation_config=given)
        assert torch.equal(got.output, expected)
        assert len(got.token_ids[0][0]) == 12
    model.generation_config.top_k = 1
    for options in ({"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}):
        got, expected = both(model, tokenizer, top_k=None, eos_token_id=None, **options)
        assert torch.equal(got.output, expected)
        assert not torch.equal(expected, both(model, tokenizer, eos_token_id=None, **options)[1])


def test_rows_are_those_of_the_merged_config(model):
    model.generation_config.num_beams = 3
    got, expected = both(model, None, generation_config=GenerationConfig(do_sample=False))
    assert torch.equal(got.output, expected)
    assert got.report.rows == 6


def test_the_users_config_is_left_alone(model, tokenizer):
    given = GenerationConfig(do_sample=False)
    before = given.to_dict()
    generate(model, tokenizer, ROWS, max_new_tokens=2, generation_config=given, num_beams=2)
    assert given.to_dict() == before


@pytest.mark.parametrize("where", ["model", "config", "call"])
def test_a_dynamic_cache_is_no_other_cache(model, where):
    options = {"cache_implementation": "dynamic"}
    expected = plain(model)
    if where == "model":
        model.generation_config.cache_implementation, options = "dynamic", {}
    if where == "config":
        options = {"generation_config": GenerationConfig(**options)}
    assert torch.equal(generate(model, None, ROWS, max_new_tokens=12, sharing=ALWAYS, **options).output, expected)


@pytest.mark.parametrize("form", [int, lambda e: [e], lambda e: (e, 3), torch.tensor, lambda e: torch.tensor([e, 3])])
def test_end_of_sequence_tokens_in_all_forms(model, form):
    end = second_token(model)
    got, expected = both(model, None, eos_token_id=form(end))
    assert torch.equal(got.output, expected)
    assert got.token_ids[0][0][-1] == end


@pytest.mark.parametrize("none", [[], (), torch.tensor([], dtype=torch.long)])
def test_no_end_of_sequence_token(model, tokenizer, none):
    got, expected = both(model, tokenizer, eos_token_id=none)
    assert torch.equal(got.output, expected)
    assert len(got.token_ids[0][0]) == 12


@pytest.mark.parametrize("ends", [[], (7,), torch.tensor([7])], ids=str)
def test_no_padding_token_beside_end_of_sequence_tokens_in_all_forms(model, ends):
    model.generation_config.pad_token_id = None
    got = generate(model, None, [ROWS[0][:3], ROWS[1]], max_new_tokens=2, eos_token_id=ends)
    assert got.output[0, :4].tolist() == [7 if len(ends) else 0] * 4


# ---------------------------------------------------------------------- where rows end


def test_tokens_that_look_like_padding_are_kept():
    model = tiny_model("llama", vocab_size=16, dtype=torch.float64, seed=3)
    for prompts in ([[14, 2, 3]], [[14, 2, 3]] * 2):
        got = generate(model, None, prompts, max_new_tokens=3)
        assert got.token_ids == [[row[3:]] for row in got.output.tolist()]
        assert got.token_ids[0] == [[5, 0, 0]]


class After(StoppingCriteria):
    """Ends the first row at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row == 0 and input_ids.shape[1] >= self.length for row in range(len(input_ids))])


def test_padding_behind_a_stopping_criterion_is_dropped(model):
    got = generate(model, None, ROWS, max_new_tokens=6, eos_token_id=1, stopping_criteria=[After(len(ROWS[0]) + 2)])
    assert got.output[0, -4:].tolist() == [0] * 4
    assert [len(row) for (row,) in got.token_ids] == [2, 6]


@pytest.mark.parametrize("pad", ["other", "same"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_beams": 3, "eos_token_id": []}], ids=str)
def test_rows_end_together_where_they_end_alone(model, tokenizer, pad, mode):
    options = {"max_new_tokens": 12, "pad_token_id": 256 if pad == "same" else 257, "eos_token_id": 256} | mode
    options["suppress_tokens"] = list(range(128, 256))  # which are no characters by themselves
    stop = generate(model, tokenizer, ROWS, **options).texts[0][0][3:5]
    options |= {"stop_strings": stop}
    alone = [generate(model, tokenizer, [row], **options) for row in ROWS]
    together = generate(model, tokenizer, ROWS, **options)
    assert together.token_ids == [each.token_ids[0] for each in alone]
    lengths = {len(row) for (row,) in together.token_ids}
    assert len(lengths) == 2
    assert together.texts[0][0].endswith(stop) or mode


def test_every_form_of_a_length_is_that_of_transformers(model):
    prompts = [ROWS[0][:4], ROWS[1]]
    ids = torch.tensor([[0] * 3 + prompts[0], prompts[1]])
    forms = [
        ({}, {}, {}),
        ({}, {}, {"max_new_tokens": None}),
        ({}, {}, {"max_length": 11}),
        ({"max_length": 12}, {}, {}),
        ({"max_new_tokens": 3}, {}, {}),
        ({}, {"max_length": 10}, {}),
        ({}, {"max_new_tokens": 5}, {"max_length": 9}),
        ({"max_length": 12}, {}, {"max_new_tokens": 2}),
    ]
    own = model.generation_config
    for in_model, in_config, in_call in forms:
        model.generation_config = GenerationConfig(**{**own.to_diff_dict(), **in_model})
        given = {"generation_config": GenerationConfig(**in_config)} if in_config else {}
        expected = model.generate(ids, attention_mask=(ids > 0).long(), **given, **in_call)
        for sharing in (ALWAYS, NEVER):
            got = generate(model, None, prompts, sharing=sharing, **given, **in_call)
            assert torch.equal(got.output, expected), (in_model, in_config, in_call)


def test_padded_ids_are_told_as_transformers_tells_them(model):
    ids = torch.tensor([[0, 0, *ROWS[0][:5]], ROWS[1]])
    expected = model.generate(ids, max_new_tokens=5)
    for sharing in (ALWAYS, NEVER):
        got = generate(model, None, ids, max_new_tokens=5, sharing=sharing)
        assert torch.equal(got.output, expected)
    for wrong, words in ((ids.flip(1), "prompt 0 has padding .token 0. behind its first token"),):
        with pytest.raises(stemma.InvalidBatchError, match=words):
            generate(model, None, wrong, max_new_tokens=5)
    with pytest.raises(stemma.InvalidBatchError, match="padding and an end-of-sequence token"):
        generate(model, None, ids, max_new_tokens=5, eos_token_id=[0])


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(model, tokenizer):
    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 257), ("<eos>", 256)]
    )
    assert ending("ab")["input_ids"] == [257, 97, 98, 256]
    assert [prompt_ids(ending, text) for text in ("ab", "a<eos>", "")] == [[257, 97, 98], [257, 97, 256], [257]]
    assert prompt_ids(ending, "ab", continues=True) == [97, 98]
    assert prompt_ids(tokenizer, "ab<eos>") == [97, 98, 256]


OPTIONS = [
    {"num_beams": 3, "length_penalty": 0.3, "num_return_sequences": 2},
    {"num_beams": 2, "early_stopping": True, "do_sample": True, "top_k": 9},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "num_return_sequences": 3},
    {"do_sample": True, "min_p": 0.004, "typical_p": 0.9, "epsilon_cutoff": 1e-3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    {"encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": 5},
    {"bad_words_ids": [[3], [4, 5]], "sequence_bias": {(9,): 4.0}, "suppress_tokens": [7, 8]},
    {"guidance_scale": 1.7, "forced_bos_token_id": 4, "renormalize_logits": True},
    {"exponential_decay_length_penalty": (3, 1.4), "remove_invalid_values": True, "begin_suppress_tokens": [6]},
    {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1] + row + 1) % 250, 3]},
    {"prefill_chunk_size": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_options_give_the_tokens_of_transformers(model, options):
    got, expected = both(model, None, eos_token_id=[256, 11], **options)
    assert torch.equal(got.output, expected)


# ---------------------------------------------------------------------- refusals


ASSISTED = [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"use_mtp": True}]


@pytest.mark.parametrize("where", ["model", "config", "call"])
@pytest.mark.parametrize("options", ASSISTED, ids=lambda options: next(iter(options)))
def test_assisted_decoding_is_refused_wherever_it_is_set(model, options, where):
    given = options
    if where == "model":
        model.generation_config.update(**options)
        given = {}
    if where == "config":
        given = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: .* not made for assisted decoding; leave it out"):
        generate(model, None, ROWS, max_new_tokens=8, **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"stop_strings": "a"}, "needs a tokenizer"),
        ({"generation_config": GenerationConfig(stop_strings=["a"])}, "needs a tokenizer"),
        ({"penalty_alpha": 0.6}, "not made for contrastive search"),
        ({"inputs": torch.tensor([[5]])}, "inputs cannot be given"),
        ({"num_beams": 2, "streamer": object()}, "streamer"),
        ({"position_ids": torch.arange(7)[None]}, "position_ids is an input of the model"),
        ({"token_type_ids": torch.arange(7)[None]}, "token_type_ids"),
        ({"token_healing": True}, "token_healing cannot be given"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "token_healing cannot be given"),
        ({"do_sample": True, "temperature": math.nan}, r"temperature is not a number"),
        ({"do_sample": True, "top_p": math.nan}, r"top_p is not a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"max_new_tokens": None, "max_length": 7}, "max_length=7 leaves no room behind a prompt of 7 tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_prompts_are_encoded(model, options, words):
    with mock.patch.object(SharedPrefixCache, "of") as encode, pytest.raises(ValueError, match=words):
        generate(model, None, ROWS, **{"max_new_tokens": 4} | options)
    encode.assert_not_called()


# ---------------------------------------------------------------------- share="never"


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}],
    ids=str,
)
def test_never_takes_what_transformers_takes(options):
    model = tiny_model("llama", vocab_size=258, dtype=torch.float64)
    got, expected = both(model, None, sharing=NEVER, pad_token_id=0, **options)
    assert torch.equal(got.output, expected)


def test_never_decodes_with_an_assistant_and_gives_attention_weights():
    model = tiny_model("llama", vocab_size=258, dtype=torch.float64)
    model.set_attn_implementation("eager")
    expected = generate(model, None, ROWS[:1], max_new_tokens=8, sharing=NEVER).token_ids
    got = generate(model, None, ROWS[:1], max_new_tokens=8, sharing=NEVER, prompt_lookup_num_tokens=3)
    assert got.token_ids == expected
    options = {"output_attentions": True, "return_dict_in_generate": True}
    output = generate(model, None, ROWS, max_new_tokens=2, sharing=NEVER, **options).output
    assert output.attentions[0][0].shape[-1] == len(ROWS[0])


def test_never_checks_no_lengths():
    model, row = cached("llama, grouped queries"), [5] * 510
    assert len(generate(model, None, [row], max_new_tokens=3, sharing=NEVER, eos_token_id=[]).token_ids[0][0]) == 3
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(**SIZES, rope_parameters=rope)
    assert len(generate(model, None, [row], max_new_tokens=4, sharing=NEVER, eos_token_id=[]).token_ids[0][0]) == 4


def test_threads_may_share_a_model_that_is_not_enabled():
    model = tiny_model("llama", vocab_size=64, dtype=torch.float64)
    prompts = [[[*range(20), start + row] for row in range(3)] for start in range(8)]

    def tokens(rows):
        return stemma.generate(model, None, rows, max_new_tokens=4, sharing=ALWAYS).token_ids

    expected = [tokens(rows) for rows in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokens, prompts)) == expected
    assert not is_enabled(model)
