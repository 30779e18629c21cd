"""Sizes of layers found once on sample texts, kept in a file, and the model they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.files import write_json
from stemma.models.adapter import base_model
from stemma.models.fingerprint import active_adapters

__all__ = ["Profile", "model_fingerprint"]

_SAMPLED = 256
"""Numbers looked at of each weight."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Made by `stemma.serve.prefix_kv.calibrate`."""

    model: str
    """Fingerprint of the model."""
    score: str
    """Score that importance was measured by."""
    layers: tuple[int, ...]
    """Layers that are compressed."""
    shares: Mapping[float, tuple[float, ...]]
    """For each share that is kept of all, the share that each of these layers keeps; mean over samples."""
    samples: int
    """Texts that it was found on."""

    def __post_init__(self) -> None:
        for keep, shares in self.shares.items():
            if len(shares) != len(self.layers):
                raise ValueError(f"shares[{keep}] has {len(shares)} numbers for {len(self.layers)} layers.")
            if not 0 < keep <= 1 or not all(0 < share <= 1 for share in shares):
                raise ValueError(f"shares[{keep}] = {list(shares)}: every share must be above 0 and at most 1.")

    def check(self, model: Any, keep: float, score: str) -> None:
        """Refuse what it was not made for.

        Raises:
            InvalidBatchError: another model, share or score.
        """
        layers = int(base_model(model).config.get_text_config().num_hidden_layers)
        if self.layers and self.layers[-1] >= layers:
            raise InvalidBatchError(
                f"this profile has sizes for layer {self.layers[-1]}, the model has {layers} layers; calibrate again."
            )
        if self.model != model_fingerprint(model):
            raise InvalidBatchError("this profile was made from another model or other weights; calibrate again.")
        if keep not in self.shares:
            known = ", ".join(map(str, self.shares))
            raise InvalidBatchError(f"this profile has sizes to keep {known} of all, not {keep}; calibrate again.")
        if score != self.score:
            raise InvalidBatchError(f'this profile was made with score="{self.score}", not "{score}".')

    def of(self, layers: Sequence[int], keep: float) -> list[float]:
        """Shares of the layers that are to be compressed.

        Raises:
            InvalidBatchError: they are others than those it was made for.
        """
        if tuple(layers) != self.layers:
            raise InvalidBatchError(
                f"layers {list(layers)} are to be compressed, the profile is for {list(self.layers)}: sliding windows "
                "bound other layers at this length. Calibrate on samples of such a length."
            )
        return list(self.shares[keep])

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        shares = {str(keep): list(shares) for keep, shares in self.shares.items()}
        about = {"model": self.model, "score": self.score, "layers": list(self.layers), "samples": self.samples}
        write_json(Path(path), {"format": "stemma prefix-kv profile 1", **about, "shares": shares})

    @classmethod
    def load(cls, path: Path | str) -> "Profile":
        """Read what `save` wrote.

        Raises:
            InvalidDataError: the file is missing, cannot be read, or is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                model=str(found["model"]),
                score=str(found["score"]),
                layers=tuple(map(int, found["layers"])),
                shares={float(keep): tuple(map(float, each)) for keep, each in found["shares"].items()},
                samples=int(found["samples"]),
            )
        except OSError as error:
            raise InvalidDataError(
                f"{path} cannot be read ({error}); a profile is made with calibrate(model, samples, keep).save(path)."
            ) from error
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataError(
                f"{path} is no profile as Profile.save writes it ({error!r}); make it again with "
                "calibrate(model, samples, keep).save(path)."
            ) from error


def model_fingerprint(model: Any) -> str:
    """Sixteen hexadecimal digits of the model's type and adapters, the shapes of its weights and some of their numbers:
    cheap enough for every request, the same in every process, and in float32 and bfloat16.

    Looked at are 256 numbers of each tensor of a checkpoint, evenly spread from the first to the last and rounded to
    bfloat16. Other weights are told apart unless they differ only between these numbers, or by less than that rounding.
    """
    inner = base_model(model)
    about = f"{inner.config.model_type} {active_adapters(model)}"
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    for name, weight in inner.state_dict().items():
        flat = weight.detach().flatten()
        count = min(_SAMPLED, flat.numel())
        some = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
