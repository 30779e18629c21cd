"""Adapters of peft that depend on the row that a token stands in."""

import pytest
import torch

import stemma
from decoders import SIZES
from stemma.decode.compressed_cache import CompressedCache
from stemma.decode.generate import Config
from stemma.decode.rollout import generate_groups
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.models.rotary import find_rotations
from stemma.models.tiny import tiny_model

peft = pytest.importorskip("peft")

ROWS = [[5, 6, 7, 11, 12, 8], [5, 6, 7, 9, 10], [5, 11, 12]]
ADAPTERS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "activated LoRA": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[11, 12]
    ),
}
CALLS = {
    "generate": lambda model: stemma.generate(model, None, ROWS, max_new_tokens=4),
    "rollout": lambda model: generate_groups(model, ROWS, num_generations=1, max_new_tokens=4, eos_token_id=None),
    "shared cache": lambda model: SharedPrefixCache.of(model, ROWS),
    "compressed cache": lambda model: CompressedCache.prefill(model, ROWS),
    "prefix": lambda model: stemma.SharedPrefix.from_ids(model, ROWS[0]),
    "rotations": find_rotations,
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_rows_are_refused_wherever_a_prefix_is_shared(kind):
    model = peft.get_peft_model(tiny_model("llama", **SIZES, dtype=torch.float64), ADAPTERS[kind]()).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(input_ids=torch.tensor([row]), **options)[0, len(row) :].tolist() for row in ROWS]
    got = stemma.generate(model, None, ROWS, sharing=Config(share="never"), **options)
    if kind != "activated LoRA":  # whose offsets peft itself counts from the padding in a batch
        assert [row for (row,) in got.token_ids] == alone
    stemma.enable(model.get_base_model(), self_test=False)
    for name, call in CALLS.items():
        with pytest.raises(stemma.UnsupportedModelError, match=r"learned tokens|activated LoRA"):
            pytest.fail(f"{name}: {call(model)}")


def test_ordinary_lora_is_taken():
    model = peft.get_peft_model(tiny_model("llama", **SIZES), peft.LoraConfig(target_modules=["q_proj"])).eval()
    stemma.enable(model)
    for call in CALLS.values():
        call(model)
