"""One census measurement: a tree through the shared forward against each row alone through the original attention."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stemma.census.configs import FIRST_ORDINARY_TOKEN, NOT_STANDALONE, VOCAB_SIZE, WINDOW, build, window_is_optional
from stemma.census.decoding import decode_difference
from stemma.errors import UnsupportedModelError
from stemma.prefix.tree import PrefixTree
from stemma.scoring.enable import disable, enable
from stemma.scoring.score import backward, score
from stemma.scoring.scores import Scores

__all__ = [
    "CONTROL_FACTOR",
    "EXACT",
    "INCONCLUSIVE",
    "NOT_BUILT",
    "REFUSED",
    "TOLERANCE",
    "WRONG",
    "KeepDouble",
    "Measurement",
    "census_tree",
    "measure",
]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest accepted difference of a log-probability (nats), and of a gradient relative to the parameter's largest."""

CONTROL_FACTOR = 100.0
"""How many tolerances the negative control must be off for a type to be evidence."""

EXACT, REFUSED, WRONG, NOT_BUILT, INCONCLUSIVE = "exact", "refused", "wrong", "not built", "inconclusive"


@dataclass
class Measurement:
    """What the census found out about one model type."""

    model_type: str
    model_class: str = ""
    result: str = EXACT
    reason: str = ""
    exercised: list[str] = field(default_factory=list)
    """Features that took part in the forward: windows, sinks, soft-cap, grouped heads, experts, ..."""
    difference: float = 0.0
    """Largest difference of a log-probability in float32, nats."""
    difference_double: float = 0.0
    """The same in float64 with norms that keep it, nats."""
    gradient: float | None = None
    """Largest relative difference of a parameter's gradient in float64; None when not measured."""
    streamed: float | None = None
    """The same from `stemma.backward` in parts; None when not measured or when the type refuses to stream."""
    decoded: float | None = None
    """The same as `difference_double`, decoding below shared prefixes; None when not measured or refused."""
    control: float = float("inf")
    """Smallest difference of the negative control over the variants, nats."""
    seconds: float = 0.0


class KeepDouble(TorchFunctionMode):
    """Inside, double tensors are not cast down: norms, routers and softmaxes of transformers ask for float32.

    Applied to the reference and to the shared forward alike, so that a comparison in float64 has no float32 floor.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and func is Tensor.float:
            return args[0]
        if double and func in (Tensor.to, Tensor.type):
            args = (args[0], *(torch.float64 if value is torch.float32 else value for value in args[1:]))
        if double and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def census_tree(seed: int = 0) -> PrefixTree:
    """Eight sequences on four levels, up to 64 tokens: branches, a duplicate, a row that is a prefix of others."""
    generator = torch.Generator().manual_seed(seed)

    def run(length: int) -> list[int]:
        return torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE, (length,), generator=generator).tolist()

    prompt, other = run(26), run(17)
    left, right = prompt + run(18), prompt + run(9)
    rows = [left + run(14), left + run(20), right + run(25), left, right + run(1), other + run(15), other + run(24)]
    rows.append(list(rows[2]))
    deeper = rows[1][:-6] + run(8)
    return PrefixTree.from_sequences([*rows, deeper], min_shared=1)


def measure(model_type: str, seed: int = 0, gradients: bool = True) -> Measurement:
    """Compare the shared forward of a shrunken random model with each row alone.

    Types whose sliding window or attention chunk is optional are measured without it and with it. Without it decides
    between exact and refused, as it is the type's default; a refusal with it is told in `reason`.

    Args:
        model_type: a key of transformers' causal-LM mapping.
        seed: of weights and tokens.
        gradients: also compare the gradient of every parameter, in float64.
    """
    begin = time.perf_counter()
    found = Measurement(model_type)
    if model_type in NOT_STANDALONE:
        found.result, found.reason = NOT_BUILT, NOT_STANDALONE[model_type]
        return found
    tree = census_tree(seed)
    variants = (None, WINDOW) if window_is_optional(model_type) else (WINDOW,)
    for window in variants:
        try:
            _measure_variant(found, tree, window, seed, gradients)
        except UnsupportedModelError as refusal:
            if window == variants[0]:
                found.result, found.reason = REFUSED, str(refusal)
            else:
                found.reason = f"Windows or chunks shorter than the rows are refused: {refusal}"
        except Exception as error:  # whatever it is, a user would meet it instead of a named refusal
            found.result, found.reason = WRONG, f"raised {type(error).__name__}: {error}"
        if found.result != EXACT:
            break
    found.exercised = sorted(set(found.exercised))
    found.seconds = time.perf_counter() - begin
    return found


def _measure_variant(found: Measurement, tree: PrefixTree, window: int | None, seed: int, gradients: bool) -> None:
    for dtype, tolerance in TOLERANCE.items():
        model = build(found.model_type, dtype, seed, window)
        found.model_class = type(model).__name__
        with KeepDouble() if dtype == torch.float64 else nullcontext():
            with torch.no_grad():
                expected = logprobs_alone(model, tree)
                enable(model)
                shared = _largest(score(model, tree, mode="shared").logprobs - expected)
                # On calls without a tree, here a padded batch, the enabled model must still be the model it was.
                plain = _largest(score(model, tree, mode="plain").logprobs - expected)
                disable(model)
                control = _largest(logprobs_packed_without_tree(model, tree) - expected)
                found.exercised.extend(_features(model, tree))
            if dtype == torch.float32:
                found.difference = max(found.difference, shared)
            else:
                found.difference_double = max(found.difference_double, shared)
            found.control = min(found.control, control)
            name = str(dtype).removeprefix("torch.")
            if not shared <= tolerance:
                found.result, found.reason = WRONG, f"{name}: log-probabilities differ by {shared:.1e}"
            elif not plain <= tolerance:
                found.result, found.reason = WRONG, f"{name}: without a tree the enabled model differs by {plain:.1e}"
            elif not control >= CONTROL_FACTOR * tolerance:
                found.result = INCONCLUSIVE
                found.reason = f"{name}: without the tree the difference is only {control:.1e}"
            elif gradients and dtype == torch.float64:
                worst, where, streamed = _gradient_differences(model, tree)
                found.gradient = max(found.gradient or 0.0, worst)
                found.streamed = None if streamed is None else max(found.streamed or 0.0, streamed)
                with torch.no_grad():
                    auxiliary = _auxiliary_difference(model, tree)
                    disable(model)
                    try:
                        found.decoded = max(found.decoded or 0.0, decode_difference(model, seed))
                    except UnsupportedModelError as refusal:
                        found.reason = f"Decoding below shared prefixes is refused: {refusal}"
                if auxiliary is not None:
                    found.exercised.append("auxiliary loss")
                if not worst <= tolerance:
                    found.result = WRONG
                    found.reason = f"gradient of {where} differs by {worst:.1e} of its largest value"
                elif streamed is not None and not streamed <= tolerance:
                    found.result, found.reason = WRONG, f"streamed gradients differ by {streamed:.1e}"
                elif found.decoded is not None and not found.decoded <= tolerance:
                    found.result, found.reason = WRONG, f"decoding below shared prefixes differs by {found.decoded:.1e}"
                elif auxiliary is not None and not auxiliary <= tolerance:
                    found.result, found.reason = WRONG, f"auxiliary loss differs by {auxiliary:.1e}"
            if found.result != EXACT:
                return


def logprobs_alone(model: PreTrainedModel, tree: PrefixTree) -> Tensor:
    """Log-probabilities of every scored token, each row alone and unpadded through the model as it is.

    Returns:
        `(S,)` float64, sequence by sequence.
    """
    parts = []
    for index in range(tree.num_sequences):
        row = torch.from_numpy(tree.sequence(index)).long()[None]
        logits = model(input_ids=row, use_cache=False).logits.reshape(1, row.shape[1], -1)
        parts.append(_gather(logits[0, :-1], row[0, 1:]))
    return torch.cat(parts)


def logprobs_packed_without_tree(model: PreTrainedModel, tree: PrefixTree) -> Tensor:
    """The negative control: the packed row with the tree's positions under the model's plain causal attention.

    Returns:
        `(S,)` float64, to be compared with `logprobs_alone`.
    """
    row = torch.from_numpy(tree.packed_tokens).long()[None]
    positions = torch.from_numpy(tree.positions).long()[None]
    output = model(input_ids=row, position_ids=positions, attention_mask=torch.ones_like(row), use_cache=False)
    logits = output.logits.reshape(1, row.shape[1], -1)
    parts = []
    for index in range(tree.num_sequences):
        path = torch.from_numpy(tree.path[tree.offsets[index] : tree.offsets[index + 1]])
        parts.append(_gather(logits[0, path[:-1]], row[0, path[1:]]))
    return torch.cat(parts)


def _gather(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max()) if bool(difference.isfinite().all()) else float("inf")


def _gradient_differences(model: PreTrainedModel, tree: PrefixTree) -> tuple[float, str, float | None]:
    """Worst relative gradient difference over all parameters, where, and the same for the streamed forward.

    The streamed difference is None for a model that refuses to stream.
    """
    weights = torch.randn(tree.num_sequences, tree.num_columns, generator=torch.Generator().manual_seed(1))

    def loss(scores: Scores) -> Tensor:
        return (scores.logprobs.double() * weights[scores.sequence, scores.column]).sum()

    def gradients(run: Callable[[], object]) -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        run()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def alone() -> None:
        flat = torch.from_numpy(np.repeat(np.arange(tree.num_sequences), tree.lengths - 1))
        column = torch.from_numpy(tree.column[tree.scored])
        (logprobs_alone(model, tree) * weights[flat, column]).sum().backward()

    expected = gradients(alone)
    enable(model)
    worst, where = _worst(expected, gradients(lambda: backward(model, tree, loss, mode="shared")))
    try:
        streamed = gradients(lambda: backward(model, tree, loss, mode="shared", max_tokens=tree.unique_tokens // 2))
    except UnsupportedModelError:
        return worst, where, None
    finally:
        disable(model)
    return worst, where, _worst(expected, streamed)[0]


def _worst(expected: dict[str, Tensor | None], actual: dict[str, Tensor | None]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for name, reference in expected.items():
        got = actual[name]
        if reference is None:
            reference = torch.zeros(()) if got is None else torch.zeros_like(got)
        error = _largest((0 if got is None else got) - reference) / max(float(reference.abs().max()), 1e-3)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _auxiliary_difference(model: PreTrainedModel, tree: PrefixTree) -> float | None:
    """Difference of the router's load-balancing loss from that of the padded batch; None where there is none."""
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        return None
    rows = [torch.from_numpy(tree.sequence(index)).long() for index in range(tree.num_sequences)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    expected = getattr(output, "aux_loss", None)
    if not isinstance(expected, Tensor):
        return None
    enable(model)
    shared = score(model, tree, mode="shared", aux_loss=True).aux_loss
    disable(model)
    assert shared is not None
    return _largest(shared - expected)


def _features(model: PreTrainedModel, tree: PrefixTree) -> set[str]:
    """What the model's attention calls ask for on the longest row; the model is left as it was."""
    original = model.config._attn_implementation
    name = f"census_{original}"
    found: set[str] = set()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        # Some types window only the mask (boolean, or 0 where visible), whose last query sees the window's keys.
        seen = kwargs.get("sliding_window") or key.shape[2]
        if attention_mask is not None:
            last = attention_mask[0, 0, -1]
            seen = min(seen, int((last if last.dtype == torch.bool else last == 0).sum()))
        present = {
            "window": seen < key.shape[2],
            "full": seen >= key.shape[2],
            "sinks": kwargs.get("s_aux") is not None or kwargs.get("sinks") is not None,
            "soft-cap": kwargs.get("softcap") is not None,
            "grouped heads": query.shape[1] != key.shape[1],
            "narrow values": value.shape[-1] != key.shape[-1],
        }
        found.update(feature for feature, here in present.items() if here)
        if original == "eager":
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        else:
            function = ALL_ATTENTION_FUNCTIONS[original]
        return function(module, query, key, value, attention_mask, **kwargs)

    if any("expert" in type(module).__name__.lower() for module in model.modules()):
        found.add("experts")
    if not model._can_set_attn_implementation():
        return found
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.set_attn_implementation(name)
    longest = int(np.argmax(tree.lengths))
    model(input_ids=torch.from_numpy(tree.sequence(longest)).long()[None], use_cache=False)
    model.set_attn_implementation(original)
    return found
