"""A bounded pool of anchors: texts whose keys and values are known alone and below the templates of several agents.

Anchors are kept by placeholder. The pool has a limit in number for each placeholder and one in bytes for all; when it
is full, the least used of the oldest few goes (arXiv 2510.12872). It may be used from several threads: entries
are handed out as tuples, and their tensors are never written.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers
from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.files import replacing

__all__ = ["Anchor", "AnchorPool", "Deviation", "Match"]

_FORMAT, _HEADER = 1, "stemma_anchors"
_OLDEST = 5
"""Among so many of the oldest anchors, the least used is dropped."""


@dataclass(frozen=True, eq=False)
class Deviation:
    """What one agent's template changes, real minus base, of all layers but the first."""

    content: Layers
    """Of the text itself."""
    following: Layers | None
    """Of the piece of the template behind it; None where that is not known."""


@dataclass(eq=False)
class Anchor:
    """One text."""

    ids: tuple[int, ...]
    origin: str
    """How its base was made; bases of different origin are not compared."""
    base: Layers
    number: int
    """Counts anchors in the order in which they came."""
    uses: int = 0
    deviations: dict[str, Deviation] = field(default_factory=dict)
    """By agent."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        known = [self.base]
        for deviation in self.deviations.values():
            known += [deviation.content, deviation.following or ()]
        return sum(tensor.nbytes for layers in known for pair in layers for tensor in pair)


@dataclass(frozen=True, eq=False)
class Match:
    """An anchor as one agent sees it."""

    anchor: Anchor
    deviation: Deviation


class AnchorPool:
    """Anchors of any number of placeholders and agents of one model.

    Args:
        max_anchors: most anchors of a placeholder, at least 1.
        max_bytes: most bytes of all anchors, at least 1.
    """

    def __init__(self, *, max_anchors: int = 20, max_bytes: int = 1 << 30) -> None:
        for name, value in (("max_anchors", max_anchors), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.max_anchors, self.max_bytes = max_anchors, max_bytes
        self.evictions = 0
        """Anchors dropped so far."""
        self._anchors: dict[str, list[Anchor]] = {}
        self._agents: dict[str, str] = {}
        self._fingerprint: dict[str, str] | None = None
        self._counter = 0
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ whose it is

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        """Say which model the states come from; the first caller decides.

        Raises:
            InvalidBatchError: the pool belongs to another; names what differs.
        """
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = dict(fingerprint)
            names = sorted({*self._fingerprint, *fingerprint})
            other = [name for name in names if self._fingerprint.get(name) != fingerprint.get(name)]
            if other:
                raise InvalidBatchError(
                    f"the anchors of this pool were made with another {', '.join(other)} "
                    f"({self._fingerprint.get(other[0])!r}, now {fingerprint.get(other[0])!r}), so their keys and "
                    "values do not belong to this model. Start with an empty pool."
                )

    def register(self, agent: str, template: str) -> None:
        """Say which template, as a digest, an agent has.

        Raises:
            InvalidBatchError: an agent of this name has another template.
        """
        with self._lock:
            if self._agents.setdefault(agent, template) != template:
                raise InvalidBatchError(
                    f"the pool knows agent {agent!r} with another template (or other tokens of it), whose deviations "
                    "do not fit. Give the agent another name, or start with an empty pool."
                )

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._anchors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors."""
        with self._lock:
            return sum(anchor.nbytes for anchors in self._anchors.values() for anchor in anchors)

    def anchors(self, placeholder: str) -> tuple[Anchor, ...]:
        """Anchors of a placeholder, the oldest first."""
        with self._lock:
            return tuple(self._anchors.get(placeholder, ()))

    def eligible(self, placeholder: str, length: int, origin: str) -> tuple[Anchor, ...]:
        """Anchors that a text of `length` tokens can be compared with: those at least as long, of one origin."""
        return tuple(a for a in self.anchors(placeholder) if len(a.ids) >= length and a.origin == origin)

    def find(self, placeholder: str, ids: Sequence[int], origin: str) -> Anchor | None:
        """The anchor that is this very text."""
        wanted = tuple(ids)
        return next((a for a in self.anchors(placeholder) if a.ids == wanted and a.origin == origin), None)

    def matches(self, anchors: Iterable[Anchor], agent: str) -> tuple[Match, ...]:
        """Those of the anchors that know what the agent's template changes."""
        with self._lock:
            return tuple(Match(a, a.deviations[agent]) for a in anchors if agent in a.deviations)

    # ------------------------------------------------------------------ writing

    def learn(
        self, placeholder: str, ids: Sequence[int], origin: str, base: Layers, agent: str, deviation: Deviation
    ) -> bool:
        """Add a text, or another agent's deviation to it, and drop what is then too much.

        Returns:
            Whether it was kept; an anchor that alone exceeds `max_bytes` is not.
        """
        following = None if deviation.following is None else _owned(deviation.following)
        base, deviation = _owned(base), Deviation(_owned(deviation.content), following)
        with self._lock:
            anchor = self.find(placeholder, ids, origin)
            if anchor is None:
                anchor = Anchor(tuple(ids), origin, base, self._counter)
                self._counter += 1
                self._anchors.setdefault(placeholder, []).append(anchor)
            anchor.deviations[agent] = deviation
            while len(self._anchors[placeholder]) > self.max_anchors:
                self._drop([(placeholder, a) for a in self._anchors[placeholder] if a is not anchor])
            while self.nbytes > self.max_bytes:
                others = [(name, a) for name, group in self._anchors.items() for a in group if a is not anchor]
                self._drop(others or [(placeholder, anchor)])
            return anchor in self._anchors[placeholder]

    def _drop(self, candidates: list[tuple[str, Anchor]]) -> None:
        oldest = sorted(candidates, key=lambda entry: entry[1].number)[:_OLDEST]
        name, anchor = min(oldest, key=lambda entry: (entry[1].uses, entry[1].number))
        self._anchors[name].remove(anchor)
        self.evictions += 1

    def credit(self, anchors: Sequence[Anchor], closeness_A: Tensor, top_p: float) -> None:
        """Count a use of the nearest anchors that together make up `top_p` of the closeness, one at least."""
        order = torch.argsort(closeness_A, descending=True, stable=True).tolist()
        total = 0.0
        with self._lock:
            for place in order:
                anchors[place].uses += 1
                total += float(closeness_A[place])
                if total >= top_p:
                    return

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, with what is no tensor as JSON in its header."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, object]] = []
        with self._lock:
            for placeholder, anchors in self._anchors.items():
                for anchor in anchors:
                    place = str(len(entries))
                    tensors |= _named(f"{place}.base", anchor.base)
                    agents: list[dict[str, object]] = []
                    for agent, deviation in anchor.deviations.items():
                        tensors |= _named(f"{place}.content.{len(agents)}", deviation.content)
                        tensors |= _named(f"{place}.following.{len(agents)}", deviation.following or ())
                        agents.append({"agent": agent, "following": deviation.following is not None})
                    entry = {"placeholder": placeholder, "ids": list(anchor.ids), "origin": anchor.origin}
                    entries.append({**entry, "number": anchor.number, "uses": anchor.uses, "agents": agents})
            about = {
                "format": _FORMAT,
                "fingerprint": self._fingerprint,
                "agents": self._agents,
                "max_anchors": self.max_anchors,
                "max_bytes": self.max_bytes,
                "anchors": entries,
            }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "AnchorPool":
        """Read what `save` wrote. Whether it fits a model is asked by `bind`.

        Raises:
            InvalidDataError: the file is missing, damaged, or of another format.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']}, expected {_FORMAT}")
            pool = cls(max_anchors=about["max_anchors"], max_bytes=about["max_bytes"])
            pool._fingerprint, pool._agents = about["fingerprint"], dict(about["agents"])
            for place, entry in enumerate(about["anchors"]):
                base = _layers(tensors, f"{place}.base")
                anchor = Anchor(tuple(entry["ids"]), entry["origin"], base, entry["number"], entry["uses"])
                for index, known in enumerate(entry["agents"]):
                    following = _layers(tensors, f"{place}.following.{index}") if known["following"] else None
                    content = _layers(tensors, f"{place}.content.{index}")
                    anchor.deviations[known["agent"]] = Deviation(content, following)
                pool._anchors.setdefault(entry["placeholder"], []).append(anchor)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidDataError(
                f"{path} holds no anchors that can be read ({type(error).__name__}: {error}); it should be a file that "
                "AnchorPool.save wrote."
            ) from error
        pool._counter = 1 + max((a.number for group in pool._anchors.values() for a in group), default=-1)
        return pool


def _owned(layers: Layers) -> Layers:
    """Copies that keep no larger tensor alive."""
    return tuple(KeyValues(*(tensor.detach().clone() for tensor in pair)) for pair in layers)


def _named(name: str, layers: Layers) -> dict[str, Tensor]:
    return {
        f"{name}.{layer}.{part}": tensor.contiguous()
        for layer, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }


def _layers(tensors: Mapping[str, Tensor], name: str) -> Layers:
    found: list[KeyValues] = []
    while f"{name}.{len(found)}.key" in tensors:
        found.append(KeyValues(*(tensors[f"{name}.{len(found)}.{part}"] for part in ("key", "value"))))
    return tuple(found)
