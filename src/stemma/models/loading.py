"""Open a model, its config or its tokenizer from a folder or a hub id, with errors that say what to do."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemma.errors import UnsupportedModelError
from stemma.files import digest
from stemma.models.tokens import as_id_list
from stemma.train.pretrained import whole_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_config", "load_model", "load_tokenizer", "model_digest"]


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
    except Exception as error:  # transformers raises many kinds of a broken config
        found = f"no config could be read from '{reference}'"
        if not path.exists():
            found = f"'{reference}' is no folder here; if it is meant as a hub id, no config could be read from there"
        raise UnsupportedModelError(f"{found}: {_first_line(error)}") from error


def load_tokenizer(reference: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        reference: a model folder or a hub id.

    Raises:
        UnsupportedModelError: no model is there, or it has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    _refuse_file(reference)
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no files for some types
            raise ValueError("its vocabulary would be empty")
        return tokenizer
    except Exception as error:  # transformers raises many kinds here
        load_config(reference)  # where there is no model at all, that is what to say
        raise UnsupportedModelError(
            f"'{reference}' has no tokenizer that can be loaded ({' '.join(str(error).split())}). Give a folder that "
            "both the model and its tokenizer were saved in."
        ) from error


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
        UnsupportedModelError: no model or whole weights there, the architecture is not a causal language model, or this
            machine has no such device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = _device(device)
    config = load_config(reference)
    try:
        if random_init:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            return model.eval()
        _refuse_file(reference)
        model = whole_model(AutoModelForCausalLM, reference, dtype=getattr(torch, dtype))
        as_id_list(model.generation_config.eos_token_id)  # raises where it holds none
        return model.to(device).eval()
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"the weights of '{reference}' cannot be read ({_first_line(error)}): a file is damaged or not whole. Save "
            "or download the model again."
        ) from error
    except Exception as error:  # as many
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"'{reference}' (model type '{config.model_type}') could not be loaded as a causal language model: "
            f"{_first_line(error)}"
        ) from error


def model_digest(reference: str) -> str:
    """A digest of the files that a model and its tokenizer are loaded from: another one, another model.

    Args:
        reference: a model folder or a hub id.

    Raises:
        UnsupportedModelError: no model is there.
    """
    from transformers.utils import cached_file

    _refuse_file(reference)
    load_config(reference)
    config = cached_file(reference, "config.json")
    assert config is not None
    suffixes = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
    # A training run keeps its progress beside the model of a checkpoint.
    files = (path for path in Path(config).parent.iterdir() if path.name != "trainer_state.json")
    return digest(*sorted(path for path in files if path.suffix in suffixes and path.is_file()))


def _refuse_file(reference: str) -> None:
    if Path(reference).is_file():
        raise UnsupportedModelError(
            f"'{reference}' is a config, without weights and tokenizer; give the folder of a saved model. Only `stemma "
            "explain` and `stemma check --random-init` need no weights."
        )


def _device(name: str) -> str:
    """The device that a name stands for, tried out."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # without CUDA torch asserts
        reason = _first_line(error).partition(". ")[0]
        raise UnsupportedModelError(
            f"the device '{name}' cannot be used here: {reason}. Give auto, cpu, or one that torch finds on this "
            "machine, such as cuda."
        ) from error
    return name


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
