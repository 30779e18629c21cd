"""A streamed backward runs the forward again, so the model must still be what it was; as autograd asks of tensors."""

import pytest
import torch

import stemma
from decoders import decoder, random_tree

CHANGES = {
    "weights": lambda model: model.base_model.model.model.layers[0].mlp.up_proj.weight.detach().mul_(1.1),
    "an optimizer's step": lambda model: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    ).step(),
    "the active adapter": lambda model: model.set_adapter("other"),
    "a disabled adapter": lambda model: model.base_model.disable_adapter_layers(),
    "training mode": lambda model: model.train(),
}


def with_adapters():
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(decoder(), config)
    model.add_adapter("other", config)
    return model.double().eval()


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_forward_and_streamed_backward_are_refused(change):
    model, tree = with_adapters(), random_tree()
    loss = stemma.score(model, tree, mode="shared", max_tokens=12).logprobs.sum()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match="changed between the parts of a streamed forward and backward"):
        loss.backward()


def test_what_comes_back_is_no_change():
    model, tree = with_adapters(), random_tree()
    loss = stemma.score(model, tree, mode="shared", max_tokens=12).logprobs.sum()
    with model.disable_adapter(), torch.no_grad():
        stemma.score(model, tree, mode="shared", max_tokens=12)
    model.train()
    model.eval()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_loss_that_changes_the_model_is_refused():
    model, tree = with_adapters(), random_tree()

    def loss(scores):
        model.set_adapter("other")
        return scores.logprobs.sum()

    with pytest.raises(RuntimeError, match="active adapters changed"):
        stemma.backward(model, tree, loss, mode="shared", max_tokens=12)
