"""Say what sharing saves for a model and a batch, and which way would be taken.

Nothing is computed with the model: its config is enough, no weights are read, so this also plans for models larger than
this machine. Models that the config shows to be unfit (recurrence, encoders, ...) are refused; whether another one is
exact is what `stemma check` finds out. The batch is made up from three lengths, one prompt and a group of responses to
it, or read from --sequences: a JSONL file with [5, 9, 2] or {"input_ids": [5, 9, 2]} on each line, or else with
{"prompt_ids": [5], "completion_ids": [[9, 2], [4]]}.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["Config", "main"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma explain`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, hub id or config.json; only the config is read."""
    sequences: Path | None = None
    """JSONL file of token ids, one sequence or one group of a prompt and its completions on each line."""
    prompt_tokens: int | None = None
    """Tokens of the made-up prompt."""
    response_tokens: int | None = None
    """Tokens of each made-up response."""
    group_size: int | None = None
    """Number of made-up responses."""
    max_tokens: int | None = None
    """Token budget of one forward call; a batch above it is streamed."""
    min_shared: int = 8
    """Shortest shared run, in tokens, that is worth a node of the tree."""

    def __post_init__(self) -> None:
        lengths = (self.prompt_tokens, self.response_tokens, self.group_size)
        if (self.sequences is None) == (None in lengths) or (self.sequences is not None and any(lengths)):
            raise ValueError(
                "give either --sequences FILE, or all of --prompt-tokens, --response-tokens and --group-size."
            )
        for name in ("prompt_tokens", "response_tokens", "group_size", "max_tokens", "min_shared"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def main(config: Config) -> dict[str, Any]:
    """Print the plan and return it."""
    import stemma
    from stemma.cli._batch import made_up_tree, read_batch
    from stemma.models.limits import check_batch
    from stemma.models.loading import load_model

    model = load_model(config.model, random_init=True, device="meta")
    if config.sequences is not None:
        batch = read_batch(config.sequences)
        batch.check(model)
        tree = batch.tree(config.min_shared)
    else:
        assert config.prompt_tokens is not None
        assert config.response_tokens is not None
        assert config.group_size is not None
        tree = made_up_tree(
            model.config.get_text_config().vocab_size,
            config.prompt_tokens,
            config.response_tokens,
            config.group_size,
            config.min_shared,
        )
    check_batch(model, tree)
    stemma.enable(model)  # refuses what cannot be shared, before a plan is made for it
    plan = stemma.explain(model, tree, max_tokens=config.max_tokens)
    print(plan)
    return {"model": config.model, **plan.to_dict()}
