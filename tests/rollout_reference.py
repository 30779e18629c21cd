"""A small model with peaked distributions, and sampling from it in plain Python, one row and one token at a time."""

import torch

from stemma.models.tiny import tiny_model

VOCAB = 23
EOS = [2, 3, 7, 9, 13, 20]
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4], [6, 6, 11], [12, 0, 3, 15, 2]]


def make(model_type: str, dtype: torch.dtype = torch.float64, **overrides):
    # A wide initialisation gives peaked, different distributions at every position.
    width = "init_std" if model_type == "opt" else "initializer_range"
    options = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64, "seed": 3, width: 0.25}
    return tiny_model(model_type, dtype=dtype, **options, **overrides)


@torch.no_grad()
def forward_alone(model, ids: list[int]) -> torch.Tensor:
    """Logits (length, V) of one sequence alone, without cache or padding."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def sample_alone(model, prompt, uniform, *, temperature, eos, top_k=0, top_p=1.0) -> list[int]:
    """Inverse transform sampling in plain Python: the whole sequence is encoded again for every token."""
    completion: list[int] = []
    for u in uniform:
        probabilities = (forward_alone(model, prompt + completion)[-1].double() / temperature).softmax(-1).tolist()
        ranked = sorted(range(VOCAB), key=lambda token: -probabilities[token])
        ranked = ranked[:top_k] if top_k else ranked
        mass = sum(probabilities[token] for token in ranked)
        kept, total = [], 0.0
        for token in ranked:
            if total < top_p:
                kept.append(token)
            total += probabilities[token] / mass
        threshold = u * sum(probabilities[token] for token in kept)
        for token in sorted(kept):
            threshold -= probabilities[token]
            if threshold < 0:
                break
        completion.append(token)
        if token in eos:
            break
    return completion
