"""Special tokens: what ends a row, and texts that something follows."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import stemma
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.models.tokens import as_id_list, end_token_ids, text_ids


@pytest.mark.parametrize("ids", [[3, 5], (3, 5), torch.tensor([3, 5]), {3, 5}])
def test_ids_in_all_forms(ids):
    assert as_id_list(ids) == [3, 5]
    assert as_id_list(torch.tensor(3)) == as_id_list(3) == [3]
    assert as_id_list(None) == []


@pytest.mark.parametrize("ids", ["x", 1.5, [[1]], [2, "3"], {"a": 1}])
def test_what_is_no_id_is_refused(ids):
    with pytest.raises(ValueError, match="must be whole numbers"):
        as_id_list(ids)


@pytest.mark.parametrize(("own", "ends"), [(None, [256]), (7, [7, 256]), ([9, 256, 7], [7, 9, 256])])
def test_both_the_tokenizer_and_the_generation_config_name_ends(own, ends):
    model, tokenizer = tiny_model("llama", vocab_size=258), byte_tokenizer()
    model.generation_config.eos_token_id = own
    assert end_token_ids(model, tokenizer) == ends
    tokenizer.eos_token = None
    assert end_token_ids(model, tokenizer) == as_id_list(own if own is None else sorted(as_id_list(own)))


@pytest.mark.parametrize("text", ["", "ab", "ab<eos>", "<eos>", " a<pad>b"])
@pytest.mark.parametrize("template", ["$A", "<pad> $A", "$A <eos>", "<pad> $A <eos>", "<eos> $A <eos>", "<eos> $A"])
def test_nothing_stands_behind_a_text(text, template):
    plain = byte_tokenizer()(text)["input_ids"]
    tokenizer = byte_tokenizer()
    specials = [("<eos>", 256), ("<pad>", 257)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    front = [dict(specials)[name] for name in template.split("$A")[0].split()]
    assert text_ids(tokenizer, text) == front + plain
    assert text_ids(tokenizer, text, special_tokens=False) == plain


def test_a_tokenizer_that_reads_a_text_otherwise_between_its_own_tokens_is_refused():
    class Tokenizer:
        all_special_ids = (9,)

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 9] if add_special_tokens else [2]}

    with pytest.raises(stemma.UnsupportedModelError, match="otherwise between its special tokens"):
        text_ids(Tokenizer(), "a")
