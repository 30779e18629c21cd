"""A prefix as a handle: encoded once, extended, and given to any number of calls.

The encoder is the packed tree forward that scores and trains, with its keys and values kept, so decoding below a prefix
attends to exactly what training attends to.
"""

import hashlib
import inspect
import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stemma.cache.key_values import even_heads
from stemma.errors import InvalidBatchError, InvalidDataError, UnsupportedModelError
from stemma.files import replacing
from stemma.models.adapter import LAYOUT_ARGUMENT, TreeCall, base_model, input_device, tree_call, uncompiled
from stemma.models.fingerprint import active_adapters, fingerprint
from stemma.models.limits import check_batch, check_lengths
from stemma.models.weights_state import weights_state
from stemma.prefix.layout import Layout
from stemma.prefix.parts import Part, partition
from stemma.prefix.radix import as_ids
from stemma.prefix.tree import PrefixTree
from stemma.scoring.forward import check_calls
from stemma.scoring.refusals import check_model

__all__ = ["SharedPrefix", "encode_tree"]

_FORMAT, _TENSORS, _ABOUT = 1, "prefix.safetensors", "prefix.json"

Context = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of a path, as attention saw them, by attention module."""


class SharedPrefix:
    """Token ids and, for each attention module of one model, their keys and values.

    Made by `from_ids` and `extend`. A handle holds only what its last step added; the steps above it are shared with
    the handle it came from. Its tensors are never written.

    ```python
    import stemma
    from stemma.models.tiny import tiny_model

    model = stemma.enable(tiny_model("llama"))
    document = stemma.SharedPrefix.from_ids(model, list(range(100)))
    out = stemma.generate(model, None, [[7, 8], [9]], prefix=document, max_new_tokens=4)
    chapter = document.extend([1, 2, 3])  # the document's keys and values are not copied
    print(document.length, chapter.length)
    # prints: 100 103
    ```
    """

    def __init__(self, model: nn.Module, above: "SharedPrefix | None", ids: np.ndarray, context: Context) -> None:
        self._model = weakref.ref(base_model(model))
        self._state = _state(model)
        self._precision = _precision(model)
        self.above = above
        self.ids: np.ndarray = ids if above is None else np.concatenate([above.ids, ids])
        """`(length,)` token ids of the whole path."""
        self.added = int(ids.size)
        """Tokens that the last step added."""
        self.states = {module: even_heads(*pair) for module, pair in context.items()}
        """Keys and values of the added tokens, by module, of one head size."""
        self._sizes = {module: (pair[0].shape[-1], pair[1].shape[-1]) for module, pair in context.items()}

    def __copy__(self) -> "SharedPrefix":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedPrefix":
        """Itself: nothing in it is ever written, and a copy of its model would be another model."""
        return self

    def __reduce__(self) -> Any:
        raise InvalidDataError(
            "a SharedPrefix belongs to a model of this process and cannot be pickled; write it with "
            "prefix.save_pretrained(folder), and read it with SharedPrefix.from_pretrained(model, folder)."
        )

    @classmethod
    def from_ids(cls, model: Any, ids: Any, *, max_tokens: int | None = None) -> "SharedPrefix":
        """Encode a prefix.

        Args:
            model: an enabled model (`stemma.enable`), in evaluation mode or without dropout.
            ids: token ids, at least one.
            max_tokens: encode at most so many tokens in a forward call.

        Raises:
            InvalidBatchError: an empty prefix, ids outside the vocabulary, or more tokens than the model has positions.
            UnsupportedModelError: a layer of the model cannot share its keys and values; says which.
        """
        return cls._encode(model, None, ids, max_tokens)

    def extend(self, ids: Any, *, max_tokens: int | None = None) -> "SharedPrefix":
        """A longer prefix; this one stays as it is, and its keys and values are not copied. As `from_ids`."""
        return self._encode(self._alive(), self, ids, max_tokens)

    def _alive(self) -> nn.Module:
        """The model, as it was when the prefix was encoded."""
        model = self._model()
        if model is None:
            raise InvalidBatchError("the model of this prefix no longer exists; make a prefix from the present model.")
        self.check(model)
        return model

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(cls, model: Any, above: "SharedPrefix | None", ids: Any, max_tokens: int | None) -> "SharedPrefix":
        check_model(model)
        new = as_ids(ids, "the prefix")
        if new.size == 0:
            raise InvalidBatchError("a prefix needs at least one token.")
        before = 0 if above is None else above.length
        check_batch(model, PrefixTree.from_sequences([new]))
        check_lengths(model, before + int(new.size))
        context: Context = {} if above is None else above.context()
        for begin in range(0, new.size, max_tokens or new.size):
            tree = PrefixTree.from_sequences([new[begin : begin + (max_tokens or new.size)]])
            added = encode_tree(model, tree, context, before + begin)
            context = {
                module: (_join(context, module, 0, pair[0]), _join(context, module, 1, pair[1]))
                for module, pair in added.items()
            }
        own = {m: (_copied(key[:, :, before:]), _copied(value[:, :, before:])) for m, (key, value) in context.items()}
        return cls(model, above, new, own)

    @property
    def length(self) -> int:
        """Tokens of the whole path."""
        return int(self.ids.size)

    @property
    def path(self) -> "list[SharedPrefix]":
        """The handles from the first to this one."""
        found, step = [self], self.above
        while step is not None:
            found.append(step)
            step = step.above
        return found[::-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the whole path."""
        return sum(x.untyped_storage().nbytes() for step in self.path for pair in step.states.values() for x in pair)

    def context(self) -> Context:
        """Keys and values of the whole path in the head sizes of the model."""
        steps = [step._added() for step in self.path]
        return {
            module: (
                torch.cat([step[module][0] for step in steps], 2),
                torch.cat([step[module][1] for step in steps], 2),
            )
            for module in self.states
        }

    def _added(self) -> Context:
        """Keys and values of the added tokens in the head sizes of the model."""
        return {
            module: (self.states[module].key[..., :key_dim], self.states[module].value[..., :value_dim])
            for module, (key_dim, value_dim) in self._sizes.items()
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the whole path to `prefix.safetensors`, and what it belongs to into `prefix.json`.

        Raises:
            InvalidBatchError: the model is gone, or has changed since the prefix was encoded.
            InvalidDataError: the folder cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        model = self._alive()
        names = {module: name for name, module in model.named_modules()}
        tensors: dict[str, Tensor] = {}
        for number, step in enumerate(self.path):
            tensors[f"{number}.ids"] = torch.from_numpy(step.ids[-step.added :].copy())
            for module, (key, value) in step._added().items():
                tensors[f"{number}.{names[module]}.key"] = key.contiguous()
                tensors[f"{number}.{names[module]}.value"] = value.contiguous()
        folder = Path(folder)
        described = {
            "format": _FORMAT,
            "tokens": [step.added for step in self.path],
            "modules": [names[module] for module in self.states],
            "model": fingerprint(model) | {"computed_in": _name(self._precision)},
        }
        try:
            # The tensors come first; until the other file has followed, the digest does not fit, and neither is read.
            with replacing(folder / _ABOUT) as about, replacing(folder / _TENSORS) as file:
                save_file(tensors, file)
                described["sha256"] = _sha256(file)
                about.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise InvalidDataError(f"cannot write a prefix to {folder}: {error}; choose another folder.") from error

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | os.PathLike[str]) -> "SharedPrefix":
        """The prefix that `save_pretrained` wrote, on the device of the model.

        Args:
            model: an enabled model with the weights, precision (autocast included) and active adapters of the one that
                encoded it.
            folder: where it is.

        Raises:
            InvalidDataError: the files are missing or damaged, or were written by another model; says what differs.
            UnsupportedModelError: the model is not enabled, or a dropout is active.
        """
        from safetensors.torch import load_file

        check_model(model)
        inner, folder = base_model(model), Path(folder)
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            if about["format"] != _FORMAT or about["sha256"] != _sha256(folder / _TENSORS):
                raise ValueError(f"{_TENSORS} is cut off, damaged, or does not belong to {_ABOUT}")
            written, own = about["model"], fingerprint(model) | {"computed_in": _name(_precision(model))}
            written = {"computed_in": written["dtype"], **written}  # which older files do not tell
            differing = ", ".join(
                f"{key} ({written.get(key)}, here {own[key]})" for key in own if written[key] != own[key]
            )
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataError(
                f"{folder} holds no prefix that can be read ({error!r}); write it again with save_pretrained."
            ) from error
        if differing:
            raise InvalidDataError(
                f"{folder} holds a prefix of another model; it differs in {differing}. Load the model that encoded it, "
                "or make the prefix again with SharedPrefix.from_ids(model, ids)."
            )
        tensors = load_file(folder / _TENSORS, device=str(input_device(inner)))
        prefix: SharedPrefix | None = None
        for number in range(len(about["tokens"])):
            context = {
                inner.get_submodule(name): (tensors[f"{number}.{name}.key"], tensors[f"{number}.{name}.value"])
                for name in about["modules"]
            }
            prefix = cls(model, prefix, tensors[f"{number}.ids"].cpu().numpy(), context)
        assert prefix is not None
        return prefix

    def check(self, model: nn.Module) -> None:
        """Refuse another model, and this one with other weights, buffers, precision or adapters.

        What counts as a change of weights is said in `stemma.models.weights_state.weights_state`.

        Raises:
            InvalidBatchError: says what differs.
        """
        if self._model() is not base_model(model):
            raise InvalidBatchError(
                "this prefix was encoded by another model; make one with SharedPrefix.from_ids(model, ids)."
            )
        if self._state != _state(model):
            raise InvalidBatchError(
                "the model has changed since this prefix was encoded (weights, buffers, precision, device or active "
                "adapters); make the prefix again with SharedPrefix.from_ids(model, ids)."
            )
        if self._precision != _precision(model):
            raise InvalidBatchError(
                f"this prefix was encoded in {_name(self._precision)}, and the model now computes in "
                f"{_name(_precision(model))} (torch.autocast); use it as it was encoded, or make the prefix again here "
                "with SharedPrefix.from_ids(model, ids)."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copied(states: Tensor) -> Tensor:
    """A copy in the order in which files have it, so that a loaded prefix is read in the same steps."""
    return states.clone(memory_format=torch.contiguous_format)


def _join(context: Context, module: nn.Module, which: int, new: Tensor) -> Tensor:
    return torch.cat([context[module][which], new], dim=2) if module in context else new


def _state(model: nn.Module) -> tuple[object, ...]:
    """What the keys and values of a prefix depend on besides its tokens and the precision."""
    return weights_state(model), active_adapters(model)


def _precision(model: nn.Module) -> torch.dtype:
    """What the model computes in now: its own precision, or that of autocast."""
    inner = base_model(model)
    device = input_device(inner).type
    if inner.dtype != torch.float64 and torch.is_autocast_enabled(device):  # which leaves float64 alone
        return torch.get_autocast_dtype(device)
    return inner.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def encode_tree(
    model: Any, tree: PrefixTree, context: Context | None = None, above: int = 0, max_tokens: int | None = None
) -> Context:
    """Keys and values `(1, key_value_heads, T, ...)` of all packed tokens of a tree, by attention module.

    Args:
        model: an enabled model.
        tree: the tree.
        context: keys and values of `above` tokens that stand before all sequences of the tree.
        above: their number.
        max_tokens: most tokens in a forward call; a longer node still runs in one.

    Raises:
        UnsupportedModelError: a layer of the model cannot share its keys and values; says which.
    """
    parts = [Part(0, tree.unique_tokens, tree.order)]
    if max_tokens is not None and tree.unique_tokens > max_tokens:
        parts = partition(tree, max_tokens)
    pieces: list[Context] = []
    rest = [(part, context or {}) for part in reversed(parts)]
    while rest:
        part, over = rest.pop()
        whole = _encode_part(model, Layout.of(tree, part.begin, part.end), over, above)
        tokens = part.end - part.begin
        pieces.append({module: (k[:, :, -tokens:], v[:, :, -tokens:]) for module, (k, v) in whole.items()})
        rest += [(below, whole) for below in reversed(part.below)]
    if len(pieces) == 1:
        return pieces[0]
    return {
        module: (
            torch.cat([piece[module][0] for piece in pieces], dim=2),
            torch.cat([piece[module][1] for piece in pieces], dim=2),
        )
        for module in pieces[0]
    }


def _encode_part(model: Any, layout: Layout, context: Context, above: int) -> Context:
    model, inner = uncompiled(model), base_model(model)
    device = input_device(inner)
    if above:
        layout = Layout(
            tokens=layout.tokens,
            positions=layout.positions + above,
            subtree_end=layout.subtree_end,
            node_start=layout.node_start,
            node_end=layout.node_end,
            node_subtree_end=layout.node_subtree_end,
            node_parent=layout.node_parent,
            context=layout.context + above,
            max_length=layout.max_length + above,
        )
    call = TreeCall(layout, context, capture=True)
    # Types whose last layers share keys skip positions without logits there, which would leave holes in the prefix.
    skips = getattr(inner.config.get_text_config(), "num_kv_shared_layers", 0)
    spares_logits = not skips and "logits_to_keep" in inspect.signature(inner.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if spares_logits else {}
    with tree_call(call):
        model(
            input_ids=torch.from_numpy(layout.tokens)[None].to(device),
            position_ids=torch.from_numpy(layout.positions)[None].to(device),
            # Several runs of positions in one row are what this call is about; without a mask some types would take
            # them for separate sequences.
            attention_mask=torch.ones(1, layout.num_tokens, dtype=torch.int64, device=device),
            use_cache=False,
            **{LAYOUT_ARGUMENT: call},
            **extra,
        )
    check_calls(model, call)
    if not call.captured:
        raise UnsupportedModelError(f"{type(inner).__name__} has no attention layer, so it cannot share a prefix.")
    return call.captured
