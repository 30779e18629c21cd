"""A pretrained model in float32: shared scores and gradients against each row alone, through the untouched model."""

import pytest
import torch

import stemma

QUESTION = "A farmer has 12 hens, and each lays 5 eggs a week. How many eggs does she have after three weeks?"
ANSWERS = (
    "Each week the hens lay 12 * 5 = 60 eggs, so after three weeks she has 60 * 3 = 180 eggs.",
    "Each week the hens lay 60 eggs. Three weeks are 21 days. The answer is 1260.",
    "180.",
    "She cannot know before she has counted them.",
)


@pytest.mark.real
def test_scores_and_gradients_are_those_of_each_row_alone(real_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    prompt = tokenizer.encode(QUESTION + "\n")
    completions = [tokenizer.encode(answer, add_special_tokens=False) for answer in ANSWERS]
    weight = dict(model.named_parameters())["model.layers.1.self_attn.k_proj.weight"]

    truth, gradient = [], torch.zeros_like(weight)
    for completion in completions:
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        truth.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
        gradient += torch.autograd.grad(truth[-1].sum(), weight)[0]

    stemma.enable(model)
    tree = stemma.PrefixTree.from_groups([prompt], [completions])
    scores = stemma.score(model, tree, mode="shared")
    torch.testing.assert_close(scores.logprobs, torch.cat(truth).detach(), rtol=0, atol=1e-4)
    (found,) = torch.autograd.grad(scores.logprobs.sum(), weight)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-4
