"""Open a causal language model from a folder, a hub id or a bare config, with errors that say what to do."""

from pathlib import Path
from typing import TYPE_CHECKING

from stemma.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_config", "load_model"]


def load_config(reference: str) -> "PretrainedConfig":
    """Read the config of a model.

    Args:
        reference: a model folder, a hub id, or the path of a `config.json`.

    Raises:
        UnsupportedModelError: nothing is there, it is unreadable, or transformers does not know its model type.
    """
    from transformers import AutoConfig

    path = Path(reference)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedModelError(f"the folder '{reference}' has no config.json; give the folder of a saved model.")
    if not path.exists() and (path.is_absolute() or reference.startswith((".", "~")) or path.suffix == ".json"):
        raise UnsupportedModelError(f"'{reference}' does not exist; give a model folder, a config.json or a hub id.")
    try:
        return AutoConfig.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"no config could be read from '{reference}': {_first_line(error)}") from error


def load_model(
    reference: str, *, random_init: bool = False, dtype: str = "float32", device: str = "auto", seed: int = 0
) -> "PreTrainedModel":
    """Load a causal language model, in eval mode.

    Args:
        reference: a model folder or a hub id; with `random_init` also the path of a `config.json`.
        random_init: build the model from its config with fresh weights and read no checkpoint.
        dtype: name of a torch floating-point type, for example "float32" or "bfloat16".
        device: where the model goes: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1" and so on. On "meta" a
            randomly initialised model takes no memory, which is enough for planning.
        seed: seed of the fresh weights.

    Raises:
        UnsupportedModelError: no model or weights there, or the architecture is not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(reference)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if random_init:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            return model.eval()
        if Path(reference).is_file():
            raise UnsupportedModelError(
                f"'{reference}' is a config without weights. Give the model's folder, or build it with --random-init."
            )
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=getattr(torch, dtype))
        return model.to(device).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"'{reference}' (model type '{config.model_type}') could not be loaded as a causal language model: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
