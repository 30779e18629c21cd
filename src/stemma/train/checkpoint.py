"""Checkpoints: complete directories or none, loadable by `from_pretrained`, resumable to the same numbers.

A checkpoint `checkpoint-000040` holds the model and tokenizer as `save_pretrained` writes them, `training_state.pt`
(optimiser, schedule, data position, buffered rollouts, random states; tensors and plain data only, read back with
`weights_only=True`) and `trainer_state.json` to read. It is written under a temporary name and renamed, so
a directory with the right name is always whole.
"""

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stemma.errors import InvalidDataError, OutputError
from stemma.files import remove, replacing, write_json
from stemma.train.pretrained import whole_model, without_progress_bars
from stemma.train.sharding import load_full_model_state_dict

__all__ = ["StopSignal", "latest", "load_state", "load_weights", "save", "save_model"]

_PREFIX = "checkpoint-"


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    model: Any,
    processing_class: Any,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    save_total_limit: int | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-{step}` into `folder`.

    Args:
        step: optimiser steps of the whole run so far.
        model: anything with `save_pretrained` (a transformers or peft model).
        processing_class: the tokenizer.
        state: what `load_state` returns later.
        progress: JSON data to read: phase, step, metrics.
        save_total_limit: older checkpoints beyond this number are removed; None keeps all.
        weights: see `save_model`.

    Returns:
        The checkpoint's directory.
    """
    folder = Path(folder)
    for leftover in folder.glob(f".{_PREFIX}*.tmp"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    target = folder / f"{_PREFIX}{step:06d}"
    with _writing(target) as temporary:
        _save_pretrained(temporary, model, processing_class, weights)
        torch.save(dict(state), temporary / "training_state.pt")
        write_json(temporary / "trainer_state.json", dict(progress))
    if save_total_limit is not None:
        for old in _all(folder)[: -max(save_total_limit, 1)]:
            remove(old)
    return target


def save_model(
    folder: str | os.PathLike[str], *, model: Any, processing_class: Any, weights: Mapping[str, Any] | None = None
) -> Path:
    """Write a model and its tokenizer to `folder`, complete or not at all, for `from_pretrained`.

    Args:
        weights: the parameters, where the model holds only part of them (`sharding.full_model_state_dict`).
    """
    with _writing(Path(folder)) as temporary:
        _save_pretrained(temporary, model, processing_class, weights)
    return Path(folder)


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """A folder that takes the place of `target` when the block succeeds; whatever fails to write is one error."""
    try:
        with replacing(target) as temporary:
            temporary.mkdir()
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch, of a disk that is full
        reason = str(error).strip().partition("\n")[0]
        raise OutputError(f"cannot write {target}: {reason}; is there room? What was there before is kept") from error


def _save_pretrained(folder: Path, model: Any, processing_class: Any, weights: Mapping[str, Any] | None) -> None:
    with without_progress_bars():
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        processing_class.save_pretrained(folder)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the most steps in `folder`, or None."""
    found = _all(Path(folder))
    return found[-1] if found else None


def _all(folder: Path) -> list[Path]:
    numbered = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def load_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The `state` given to `save`; tensors on the CPU.

    Raises:
        InvalidDataError: the file is missing or unreadable.
    """
    path = Path(checkpoint) / "training_state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidDataError(
            f"cannot read the training state {path}: {error}. Resume from another checkpoint by removing this one"
        ) from error


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's parameters into `model`, which has the same architecture (or the same peft adapter).

    Raises:
        InvalidDataError: the weights are missing, damaged or not whole.
    """
    try:
        if getattr(model, "peft_config", None) is not None:
            _load_adapter(model, checkpoint)
            return
        stored = whole_model(type(model), checkpoint, dtype=next(model.parameters()).dtype)
        load_full_model_state_dict(model, stored.state_dict())
    except Exception as error:  # transformers, peft and safetensors raise many kinds here
        raise InvalidDataError(
            f"cannot read the weights in {checkpoint}: {' '.join(str(error).split())[:300]}. Resume from another "
            "checkpoint by removing this one"
        ) from error


def _load_adapter(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if not any((Path(checkpoint) / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise FileNotFoundError("there is no adapter_model.safetensors")  # peft would look for it on the hub
    stored = load_peft_weights(str(checkpoint), device="cpu")
    missing = sorted(get_peft_model_state_dict(model).keys() - stored.keys())
    if missing:
        raise ValueError(f"the adapter is not whole, {missing[0]} is missing")
    set_peft_model_state_dict(model, stored)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; the second acts as usual.

    Use it as a context manager around the training loop; `requested` is the signal's number, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)
