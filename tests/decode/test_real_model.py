"""A pretrained model: generation against transformers' own, and both ways to keep less of a prompt."""

import pytest
import torch

import stemma
from stemma.decode.prompts import pad_left
from stemma.serve.kvcomm import Config as Reuse
from stemma.serve.kvcomm import KVComm
from stemma.serve.prefix_kv import Config, compress

SHOTS = "".join(f"Question: What is {a} + 14?\nAnswer: {a + 14}\n\n" for a in range(10, 18, 2))
ASKED = [SHOTS + f"Question: What is {number} + 9?\nAnswer:" for number in (3, 15, 120)]


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return stemma.enable(model), AutoTokenizer.from_pretrained(folder)


@pytest.mark.real
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}], ids=str)
def test_tokens_are_those_of_transformers(real_model, mode):
    model, tokenizer = load(real_model)
    ids, mask = pad_left([tokenizer(text)["input_ids"] for text in ASKED], tokenizer.pad_token_id, "cpu")
    options = {"max_new_tokens": 10, "do_sample": False, "stop_strings": "\n\n"} | mode
    torch.manual_seed(0)
    expected = model.generate(ids, attention_mask=mask, tokenizer=tokenizer, **options)
    torch.manual_seed(0)
    got = stemma.generate(model, tokenizer, ASKED, **options)
    assert torch.equal(got.output, expected)
    assert got.report.encoded_tokens < mask.sum() * 0.6
    if not mode:
        alone = [stemma.generate(model, tokenizer, [text], **options).token_ids[0] for text in ASKED]
        assert got.token_ids == alone


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_compressed_and_passed_on(real_model, dtype):
    model, tokenizer = load(real_model, dtype)
    ids = tokenizer(ASKED[0], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for keep in (1.0, 0.6):
        cache = compress(model, ids[:, :-1], Config(keep=keep))
        got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        assert cache.report().kept_share == pytest.approx(keep, abs=0.02)
        assert keep < 1 or dtype != torch.float32 or torch.equal(got, expected)
    comm = KVComm(model, tokenizer, config=Reuse(min_anchors=1))
    asking = comm.agent("ask", [{"role": "user", "content": "{question}\n"}])
    checking = comm.agent("check", [{"role": "user", "content": "Is this right?\n{answer}\n"}])
    prefill = asking.prefill({"question": "Name three fruits, please."})
    row = model.generate(**prefill.inputs, past_key_values=prefill.cache, max_new_tokens=12, do_sample=False)
    answer = asking.answer(prefill, row)
    assert tokenizer.eos_token_id not in answer.ids
    assert [checking.prefill({"answer": answer}).mode for _ in range(2)] == ["dense", "blend"]
