"""Models from folders that hold all of their weights, and to them without transformers' progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["whole_model", "without_progress_bars"]


def whole_model(model_class: Any, reference: str | PathLike[str], **options: Any) -> Any:
    """`model_class.from_pretrained`, where every parameter has to come from the files, and so has a generation config.

    Raises:
        ValueError: the files lack parameters, which transformers would make up; names the first ones.
        Exception: what transformers raises for files that it cannot read.
    """
    from transformers import GenerationConfig

    if Path(reference, "generation_config.json").is_file():
        GenerationConfig.from_pretrained(reference)  # of a broken one the model would say nothing, and end elsewhere
    model, loading = model_class.from_pretrained(reference, output_loading_info=True, **options)
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"the weights are not whole: {', '.join(missing[:3])}{more} are missing and would be newly initialised"
        )
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Load or save weights without transformers' progress bars; they are shown again where they were before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
