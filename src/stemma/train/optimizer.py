"""AdamW and its learning-rate schedule, the same for supervised and reinforcement training."""

from typing import Any

import torch
from torch import nn

from stemma.errors import NonFiniteError

__all__ = ["adamw", "apply_gradients", "schedule"]


def adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay acts on matrices, not on biases and norm weights.

    Raises:
        ValueError: no parameter is trainable, so that training would change nothing.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; set requires_grad, or attach an adapter")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)


def schedule(optimizer: torch.optim.Optimizer, name: str, *, warmup_steps: int, total_steps: int) -> Any:
    """A transformers learning-rate schedule by its name ("linear", "cosine", "constant", ...).

    "constant" with warm-up steps becomes "constant_with_warmup", because the plain one would ignore them.
    """
    from transformers import get_scheduler

    name = "constant_with_warmup" if name == "constant" and warmup_steps else name
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)


def apply_gradients(optimizer: torch.optim.Optimizer, scheduler: Any, *, max_grad_norm: float, what: str) -> float:
    """Clip, step, advance the schedule, clear the gradients.

    Args:
        max_grad_norm: 2-norm to scale down to; 0 leaves the gradients alone.
        what: names the step in the error.

    Returns:
        The gradient's 2-norm before clipping.

    Raises:
        NonFiniteError: the norm is NaN or infinite. The parameters are untouched.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or torch.inf)
    if not torch.isfinite(norm):
        raise NonFiniteError(
            f"the gradient norm of {what} is {norm.item()}; the step was not taken. Lower the learning rate, or look "
            "for an overflow in the loss"
        )
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()
