"""What depends on the row a token stands in is refused, or computed as in each row alone."""

import gc
import weakref
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn

import stemma
from decoders import SIZES, V, decoder, random_tree
from stemma.census import build
from stemma.models.tiny import tiny_model

RANDOM = {  # functional dropout and jitter, which no module shows: model type, field
    "opt": ("dropout",),
    "biogpt": ("hidden_dropout_prob", "activation_dropout"),
    "starcoder2": ("residual_dropout",),
    "seed_oss": ("residual_dropout",),
    "phimoe": ("router_jitter_noise", "input_jitter_noise"),
    "jetmoe": ("attention_dropout",),
}


def alone(model, tree):
    found = []
    with torch.no_grad():
        for index in range(tree.num_sequences):
            ids = torch.from_numpy(tree.sequence(index))[None]
            logprobs = model(input_ids=ids).logits[0, -ids.shape[1] :].log_softmax(-1)
            wanted = tree.scored[tree.offsets[index] : tree.offsets[index + 1]].nonzero()[0]
            found.append(logprobs[wanted - 1, ids[0, wanted]])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("model_type", "field"), [(kind, field) for kind, fields in RANDOM.items() for field in fields]
)
def test_functional_dropout_and_jitter_are_refused_by_field(model_type, field):
    model = stemma.enable(build(model_type))
    config = model.config.get_text_config()
    assert hasattr(config, field)
    noisy = type(model)(config.__class__.from_dict(config.to_dict() | {field: 0.3}))
    stemma.enable(noisy.train(), self_test=False)
    with pytest.raises(stemma.UnsupportedModelError, match=rf"{field}=0\.3|active dropout 0\.3"):
        stemma.score(noisy, random_tree(vocabulary=40), mode="shared")
    stemma.score(noisy.eval(), random_tree(vocabulary=40), mode="shared")


@pytest.mark.slow
def test_whatever_draws_random_numbers_is_refused():
    """Every exact type with every field of its config that could: where two forwards differ, sharing is refused."""
    import re
    from pathlib import Path

    from stemma.census.report import read

    drawn = 0
    for model_type, row in read(Path(__file__).parents[2] / "docs" / "support.md")[1].items():
        if row["Result"] != "exact":
            continue
        config = build(model_type).config
        text = config.get_text_config()
        fields = [name for name in vars(text) if re.search("drop|jitter|noise", name)]
        for name in fields:
            if isinstance(getattr(text, name), int | float) and not isinstance(getattr(text, name), bool):
                setattr(text, name, 0.3)
        try:
            model = build(model_type).__class__(config).train()
        except ValueError:  # the type refuses one of them itself
            continue
        ids, seen = torch.arange(3, 43)[None] % text.vocab_size, []
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                seen.append(model(input_ids=ids, use_cache=False).logits)
        if all(torch.equal(seen[0], other) for other in seen[1:]):
            continue
        drawn += 1
        stemma.enable(model, self_test=False)
        with pytest.raises(stemma.UnsupportedModelError, match=r"dropout|random numbers"):
            stemma.score(model, random_tree(vocabulary=40), mode="shared")
    assert drawn >= 60


class Noise(nn.Module):
    def forward(self, hidden):
        return hidden * (1 + 0.1 * torch.rand_like(hidden)) if self.training else hidden


@pytest.mark.parametrize("how", ["neftune", "alpha dropout", "a module", "a hook after the first score"])
def test_other_random_numbers_are_refused_in_training_mode(how):
    model, tree = decoder(dtype=torch.float32).train(), random_tree()
    stemma.score(model, tree, mode="shared")
    embedding = model.get_input_embeddings()
    if how == "neftune":
        from transformers.integrations.neftune import neftune_post_forward_hook

        embedding.neftune_noise_alpha = 5.0
        embedding.register_forward_hook(neftune_post_forward_hook)
    elif how == "alpha dropout":
        model.model.layers[0].mlp.act_fn = nn.Sequential(nn.AlphaDropout(0.2), nn.SiLU())
    elif how == "a module":
        model.model.layers[0].mlp.act_fn = nn.Sequential(Noise(), nn.SiLU())
    else:
        embedding.register_forward_hook(lambda module, arguments, output: output * (1 + torch.rand_like(output)))
    message = {"neftune": "neftune_noise_alpha", "alpha dropout": "active dropout 0.2"}.get(how, "draws random numbers")
    with pytest.raises(stemma.UnsupportedModelError, match=message):
        stemma.score(model, tree, mode="shared")
    stemma.score(model, tree, mode="plain")


OWN = {
    "a generator of its own": torch.Generator().manual_seed(0),
    "NumPy": np.random.default_rng(0),
}


@pytest.mark.parametrize("source", OWN)
def test_random_numbers_of_another_generator_are_refused_in_training_mode(source):
    model, generator = decoder(dtype=torch.float32).train(), OWN[source]

    def noisy(module, arguments, output):
        if source == "NumPy":
            return output + torch.from_numpy(generator.standard_normal(output.shape)).to(output) * 0.1
        return output + torch.randn(output.shape, generator=generator) * 0.1

    model.model.layers[0].mlp.register_forward_hook(noisy)
    stemma.enable(model, self_test=False)
    with pytest.raises(stemma.UnsupportedModelError, match="draws random numbers"):
        stemma.score(model, random_tree(), mode="shared")


@pytest.mark.parametrize("how", ["its rate", "another hook", "its forward", "another module"])
def test_what_draws_random_numbers_since_the_last_score_is_refused(how):
    model, tree = build("opt"), random_tree(vocabulary=40)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    stemma.enable(model.train(), self_test=False)
    layer = model.model.decoder.layers[0]
    quiet = layer.fc1.register_forward_hook(lambda module, arguments, output: output)
    stemma.score(model, tree, mode="shared")
    if how == "its rate":
        layer.dropout = 0.3
    elif how == "another hook":
        quiet.remove()
        layer.fc1.register_forward_hook(lambda module, arguments, output: output * (1 + torch.rand_like(output)))
    elif how == "its forward":
        forward = layer.fc1.forward
        layer.fc1.forward = lambda hidden: nn.functional.dropout(forward(hidden), 0.3)
    else:
        layer.activation_fn = Noise()
    with pytest.raises(stemma.UnsupportedModelError, match="draws random numbers"):
        stemma.score(model, tree, mode="shared")


def test_the_question_does_not_keep_a_model():
    """accelerate gives models a forward of their own, bound to them."""
    model = decoder(dtype=torch.float32).train()
    model.forward = MethodType(type(model).forward, model)
    stemma.score(model, random_tree(), mode="shared")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_question_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stemma.score(decoder(dtype=torch.float32).train(), random_tree(), mode="shared")
    torch.manual_seed(3)
    model = decoder(dtype=torch.float32).train()
    torch.manual_seed(3)
    stemma.score(model, random_tree(), mode="shared")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_hooks_on_the_head_take_part(mode):
    model, tree = decoder(), random_tree()
    bias = torch.linspace(-3, 3, V, dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda module, arguments, output: output + bias)
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 1.5,))
    with torch.no_grad():
        torch.testing.assert_close(stemma.score(model, tree, mode=mode).logprobs, alone(model, tree), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_hooks_on_the_head_that_look_at_the_row_are_refused(mode):
    model = decoder()
    model.lm_head.register_forward_hook(lambda module, arguments, output: output - output.mean(dim=1, keepdim=True))
    with pytest.raises(stemma.UnsupportedModelError, match="hook on the language-model head"):
        stemma.score(model, random_tree(), mode=mode)


def lora(**options):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    model = tiny_model("llama", **SIZES, seed=0, dtype=torch.float64)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return wrapped.double().eval()


def test_activated_lora_is_refused_shared_and_right_plain():
    model = stemma.enable(lora(alora_invocation_tokens=[11, 12]), self_test=False)
    prompt = list(range(20, 40))
    rows = [[*prompt, 11, 12, 1, 2, 3], [*prompt, 11, 12, 5], [*prompt, 3, 4, 11, 12, 9]]
    tree = stemma.PrefixTree.from_sequences(rows)
    with pytest.raises(stemma.UnsupportedModelError, match="activated LoRA adapter"):
        stemma.score(model, tree)
    with pytest.raises(stemma.UnsupportedModelError, match="activated LoRA adapter"):
        stemma.check(model, tree)
    with torch.no_grad():
        plain = stemma.score(model, tree, mode="plain").logprobs
        torch.testing.assert_close(plain, alone(model, tree), rtol=0, atol=1e-6)
        with model.disable_adapter():
            stemma.score(model, tree, mode="shared")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "CPTConfig", "PrefixTuningConfig"])
def test_learned_prompts_of_peft_have_their_own_values_in_plain_mode(kind):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    options = {"CPTConfig": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1]}}.get(
        kind, {"num_virtual_tokens": 4, **({"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {})}
    )
    if kind == "CPTConfig":
        options["cpt_tokens_type_mask"] = [1, 2, 2, 4]
    model = tiny_model("llama", **SIZES, seed=0, dtype=torch.float64)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).double().eval()
    tree = random_tree()
    with torch.no_grad():
        plain = stemma.score(wrapped, tree, mode="plain").logprobs
        torch.testing.assert_close(plain, alone(wrapped, tree), rtol=0, atol=1e-6)
    with pytest.raises(stemma.UnsupportedModelError):
        stemma.enable(wrapped)
