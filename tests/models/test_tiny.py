import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stemma.errors import UnsupportedModelError
from stemma.models.tiny import byte_tokenizer, tiny_config, tiny_model, train_tokenizer

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "naïve café – 数学 🎓\t\x00 end",
    "",
    "  two  spaces ",
]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "mixtral"])
def test_model_has_the_named_sizes_and_survives_a_round_trip(model_type, tmp_path):
    model = tiny_model(model_type, vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, seed=5)
    assert model.config.hidden_size == 32
    assert model.config.num_hidden_layers == 3
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert not model.training
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        # No dropout is active in training mode either.
        assert torch.equal(loaded.train()(input_ids=ids).logits, expected)


def test_grouped_heads_overrides_and_precision():
    model = tiny_model(
        "qwen3", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, dtype=torch.float64
    )
    assert model.config.num_key_value_heads == 2
    assert model.config.head_dim == 16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_seed_decides_the_weights_and_nothing_else():
    before = torch.get_rng_state()
    first, again, other = (tiny_model(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_unusable_requests_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="'no_such_type'"):
        tiny_config("no_such_type")
    with pytest.raises(ValueError, match="'hiden_act'"):
        tiny_config("llama", hiden_act="silu")
    with pytest.raises(ValueError, match="not a multiple"):
        tiny_config("llama", hidden_size=30, num_attention_heads=4)
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads=2"):
        tiny_config("gpt2", num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        tiny_model("clip_text_model")


def test_byte_tokenizer_is_lossless_and_uses_byte_values(tmp_path):
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == list(text.encode())
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (256, 257)


def test_trained_tokenizer_compresses_and_is_lossless(tmp_path):
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=300)
    assert 258 < len(tokenizer) <= 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "unseen: ßøł"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(TEXTS, vocab_size=100)
