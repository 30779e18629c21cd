"""Small decoders, a tree and weights for whole-model tests."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

import stemma
from stemma.models.tiny import tiny_model

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
KINDS = {
    "llama, grouped queries": ("llama", {"num_key_value_heads": 2}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "gpt2, learned positions": ("gpt2", {}),
    "mistral, window 5": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "gemma2, window 5, soft-caps": ("gemma2", {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8}),
    "gpt_oss, window 5, sinks": (
        "gpt_oss",
        {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8, "num_local_experts": 4},
    ),
    "mixtral, experts": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "cohere, logit scale": ("cohere", {"num_key_value_heads": 2, "logit_scale": 0.25}),
}


def decoder(kind="llama, grouped queries", dtype=torch.float64, **overrides):
    model_type, extra = KINDS[kind]
    model = tiny_model(model_type, **SIZES, dtype=dtype, seed=0, **(extra | overrides))
    for parameter in model.parameters():  # large enough weights that attention matters
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return stemma.enable(model)


_MODELS = {}


def cached(kind):
    if kind not in _MODELS:
        _MODELS[kind] = decoder(kind)
    return _MODELS[kind]


def random_tree(seed=0, vocabulary=V, min_shared=2):
    """Three prompts, one of them the beginning of another; branches at two levels; an empty and a repeated response."""
    random = np.random.default_rng(seed)

    def run(n):
        return random.integers(0, vocabulary, n).tolist()

    first = run(11)
    prompts = [first, first + run(3), run(7)]
    turn = run(4)
    responses = [[turn + run(5), turn + run(2), run(6)], [run(3), []], [run(9), turn, turn]]
    return stemma.PrefixTree.from_groups(prompts, responses, min_shared=min_shared)


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights_of(tree, seed=0):
    return torch.randn(2, int(tree.scored.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@contextmanager
def keep_double():
    """Keep float64 where transformers casts norms and softmaxes to float32, in recomputations too."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def kept_to(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    def kept_softmax(input, *args, dtype=None, **kwargs):
        return softmax(input, *args, dtype=input.dtype if input.dtype == torch.float64 else dtype, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", kept_to),
        mock.patch.object(torch.Tensor, "float", lambda self: kept_to(self, torch.float32)),
        mock.patch.object(torch.nn.functional, "softmax", kept_softmax),
    ):
        yield
