"""PrefixKV: drop the least attended keys and values of a prompt, each layer as many as it can spare.

Use it to decode behind long prompts, or to ask many questions about one document, where keys and values take the memory
and reading them takes the time. It is an approximation.

Source: "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
2024, arXiv 2412.03409. The "prefix" is the top of a ranking, not the beginning of the text. With `A` the attention
probabilities of layer `l` over a prompt of `N` tokens and `H` heads,

- importance `I_j = sum_i (1/H) sum_h A_hij`: `stemma.cache.compressed.attention_mass`;
- ranked, cumulative priority `P_o = sum_{i<=o} I_(i) / sum_i I_i`: `stemma.cache.compressed.retained_mass`;
- size at a common threshold `O(p) = min{o : P_o >= p}`, and by binary search the `p` with `sum_l O_l(p) = r L N`:
  `stemma.serve.prefix_kv.budget.waterline`.

What we changed and why:

- Importance is summed in slices of queries inside the registered attention, so no attention matrix is formed and any
  kernel computes the output; the paper's code needs eager attention with weights, of size `L H N^2`.
- The budget is met exactly: `floor(r L N)` tokens, what bisection leaves over going to the layer that retains least.
  The paper's code stops within five tokens, truncates, and may bisect for ever where ties leave no such `p`. Protected
  tokens count, and the sizes are then the best there are for the layer that retains least.
- By default a token's mass is divided by the number of queries that see it: the sum favours the beginning of a prompt,
  which more queries see, and on a pretrained model the paper's `score="observed"` is further from the whole cache.
- Batches: every row has its own sizes and tokens, as if it were alone.
- While decoding, `Config.drop_every` drops the least important tokens. The paper's code drops whatever stands 25 places
  from the end of what is kept, which saves the bookkeeping and gives up an important token as soon as any other; here
  attention mass goes on being summed, at the price of one more product of the new queries with the keys.
- A layer whose sliding window is shorter than the prompt is bounded already: it is left whole and is not part of the
  budget.

What the waterline optimises is attention mass, which is not the error of the output: see docs/recipes.md for where it
gains and where it does not. The baselines are other combinations of `allocation` and `score`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from stemma.cache.compressed import priority, retained_mass
from stemma.decode.compressed_cache import CompressedCache, DecodeBudget
from stemma.errors import InvalidBatchError
from stemma.serve.prefix_kv.budget import proportional, pyramid, total_tokens, waterline
from stemma.serve.prefix_kv.profile import Profile, model_fingerprint
from stemma.train.seeds import stream_seed

__all__ = ["Config", "Profile", "calibrate", "compress", "drop", "votes_of"]

_POOLED = 5
"""Neighbouring tokens over which the votes of the last queries are averaged (SnapKV, arXiv 2404.14469, section 4)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is kept of a prompt."""

    keep: float = 0.5
    """Share of the keys and values that is kept, above 0 and at most 1, over all layers without a shorter window; the
    paper's "budget" (its code's `ratio` is the share that is dropped). Protected tokens stay even where it is less."""
    allocation: Literal["waterline", "uniform", "pyramid"] = "waterline"
    """Sizes of the layers: "waterline" is PrefixKV's; "uniform" gives all the same; "pyramid" falls linearly with depth
    as in PyramidKV (arXiv 2406.02069)."""
    score: Literal["observed", "normalized", "window", "recent", "random"] = "normalized"
    """Importance of tokens: "observed" is PrefixKV's attention mass, the paper's choice; "normalized" divides it by the
    number of queries that see the token; "window" is the attention of the last queries only, as in SnapKV (arXiv
    2404.14469); "recent" and "random" look at no attention ("recent" with `protect_first=4` is StreamingLLM's, arXiv
    2309.17453)."""
    protect_first: int = 1
    """Tokens at the beginning that every layer keeps, at least 0; the paper's 1."""
    protect_last: int = 1
    """Tokens at the end that every layer keeps, at least 0; the paper's 1."""
    window: int = 16
    """With `score="window"`: how many last queries vote, at least 1; their own tokens are kept."""
    drop_every: int | None = None
    """While decoding: after so many new tokens, at least 1, every layer goes back to its share of all tokens, and those
    with the least summed attention go. None: all new tokens are kept."""
    seed: int = 0
    """Of `score="random"`."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}.")
        for name, values in (
            ("allocation", ("waterline", "uniform", "pyramid")),
            ("score", ("observed", "normalized", "window", "recent", "random")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        for name, least in (("protect_first", 0), ("protect_last", 0), ("window", 1), ("drop_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if self.protect_first + self.protect_last < 1:
            raise ValueError("protect_first + protect_last must be at least 1: no layer may lose all of its keys.")
        if self.score in ("recent", "random") and self.allocation == "waterline":
            raise ValueError(f'allocation="waterline" compares attention, which score="{self.score}" does not look at.')
        if self.score not in ("observed", "normalized") and self.drop_every is not None:
            raise ValueError('drop_every goes by summed attention and needs score="observed" or "normalized".')

    @property
    def protected(self) -> tuple[int, int]:
        """Tokens kept at the beginning and at the end."""
        return self.protect_first, max(self.protect_last, self.window if self.score == "window" else 0)


def compress(
    model: Any,
    rows: Sequence[Any] | Tensor,
    config: Config | None = None,
    *,
    profile: Profile | None = None,
    max_tokens: int | None = None,
    room: int = 64,
) -> CompressedCache:
    """Encode rows and keep the most important of their keys and values.

    To go on with `generate`, leave out the last token of each prompt here: a model needs a token to predict from. What
    follows may be longer, such as a question about a document.

    ```python
    import torch
    import stemma
    from stemma.models.tiny import tiny_model
    from stemma.serve.prefix_kv import Config, compress

    model, ids = stemma.enable(tiny_model("llama")), torch.arange(200)[None]
    cache = compress(model, ids[:, :-1], Config(keep=0.25))
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8, pad_token_id=0
    )
    print(tokens.shape)
    # prints: torch.Size([1, 208])
    ```

    Args:
        model: an enabled model (`stemma.enable`) in evaluation mode.
        rows: token ids of each row, of any lengths and without padding; a tensor `(rows, length)` where all have one.
        config: what is kept.
        profile: sizes of the layers from `calibrate`, in place of a search on these rows; for its scores and
            shares only.
        max_tokens: tokens of a row in one forward call; what is dropped is the same.
        room: new tokens to make room for; more only cost a copy.

    Returns:
        A transformers `Cache` that has seen all tokens of `rows`; `report()` says what it keeps.

    Raises:
        InvalidBatchError: no row, ids without a row around them, an empty row or one that is shorter than what is
            protected, ids outside the vocabulary, more tokens than the model has positions, attention that is not
            finite, or a profile of another model, score or share.
        UnsupportedModelError: a layer of the model has no keys of its own that could be dropped; says which.
    """
    config = config or Config()
    if profile is not None:
        profile.check(model, config.keep, config.score)
    rows = _rows(rows)
    _check_protected(rows, config)
    cache = CompressedCache.prefill(model, rows, votes=votes_of(config), max_tokens=max_tokens, room=room)
    drop(cache, config, profile)
    return cache


def votes_of(config: Config) -> int | None:
    """How many of the last queries a score looks at; None: all."""
    return {"observed": None, "normalized": None, "window": config.window}.get(config.score, 0)


def drop(cache: CompressedCache, config: Config, profile: Profile | None = None) -> None:
    """Compress a cache that was only filled (`stemma.decode.compressed_cache.CompressedCache.prefill`), as
    `compress` does.

    Raises:
        InvalidBatchError: as `compress`, and a cache that was filled with other votes than `votes_of`.
    """
    if cache.votes != votes_of(config):
        raise InvalidBatchError(
            f'score="{config.score}" needs a cache filled with votes={votes_of(config)}, not {cache.votes}.'
        )
    tokens: list[dict[int, np.ndarray]] = []
    retained: dict[int, list[float]] = {}
    for row, mass in enumerate(cache.importance()):
        if not mass:
            raise InvalidBatchError(
                f"every layer has a sliding window shorter than row {row}, so its keys and values are bounded already "
                "and there is nothing to compress. Use the model's own cache."
            )
        orders, curves = _ranked(mass, config)
        sizes = _sizes(list(mass), curves, config, profile).tolist()
        tokens.append({layer: np.sort(order[:size]) for layer, order, size in zip(mass, orders, sizes, strict=True)})
        if config.score in ("observed", "normalized"):
            for (layer, observed), order, size in zip(mass.items(), orders, sizes, strict=True):
                retained.setdefault(layer, []).append(float(retained_mass(observed, order)[size]))
    cache.keep(
        tokens,
        retained={layer: float(np.mean(values)) for layer, values in retained.items()},
        budget=None if config.drop_every is None else DecodeBudget(config.drop_every, *config.protected),
    )


def calibrate(
    model: Any,
    rows: Sequence[Any] | Tensor,
    keep: Sequence[float],
    config: Config | None = None,
    *,
    max_tokens: int | None = None,
) -> Profile:
    """Find the share of each layer once on sample texts, the mean over them; `compress` then searches no more.

    Args:
        model: an enabled model.
        rows: token ids of the samples as for `compress`, encoded one by one; the paper takes about ten.
        keep: shares to find sizes for.
        config: score and protected tokens; its `keep` does not matter.
        max_tokens: see `compress`.

    Raises:
        InvalidBatchError: as `compress`; no share, or samples whose lengths differ in which layers are bounded by
            a window.
        ValueError: a share outside (0, 1], or an allocation that has nothing to calibrate.
    """
    config = config or Config()
    configs = [_replaced(config, share) for share in keep]
    if not configs or config.allocation != "waterline":
        raise ValueError('calibration needs shares to keep and allocation="waterline".')
    rows = _rows(rows)
    found: dict[float, list[np.ndarray]] = {each.keep: [] for each in configs}
    layers: list[int] | None = None
    for index in range(len(rows)):
        sample = rows[index : index + 1]
        _check_protected(sample, config)
        cache = CompressedCache.prefill(model, sample, votes=votes_of(config), max_tokens=max_tokens)
        (mass,) = cache.importance()
        if layers is not None and layers != list(mass):
            raise InvalidBatchError(
                f"sample {index} leaves layers {list(mass)} to compress, those before it {layers}: some are shorter "
                "than a sliding window of the model. Calibrate on samples that are all longer, or all shorter."
            )
        layers = list(mass)
        _, curves = _ranked(mass, config)
        for each in configs:
            found[each.keep].append(_sizes(layers, curves, each, None) / (curves[0].size - 1))
    if not layers:
        raise InvalidBatchError(
            "there is nothing to calibrate on: no samples, or every layer is bounded by its sliding window."
        )
    return Profile(
        model=model_fingerprint(model),
        score=config.score,
        layers=tuple(layers),
        shares={share: tuple(np.mean(each, axis=0).tolist()) for share, each in found.items()},
        samples=len(rows),
    )


def _replaced(config: Config, keep: float) -> Config:
    return Config(**{**config.__dict__, "keep": keep})


def _rows(rows: Sequence[Any] | Tensor) -> list[Any]:
    """The rows one by one; refuses what is no collection of rows."""
    found = list(rows) if _is_run(rows) or isinstance(rows, Iterator) else [rows]
    for index, row in enumerate(found):
        if not _is_run(row):
            raise InvalidBatchError(
                f"row {index} is {row!r}; expected were rows of token ids, [[1, 2, 3], [4, 5]] say, or a tensor "
                "(rows, length). Put a single row into a list."
            )
    return found


def _is_run(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _check_protected(rows: Sequence[Any], config: Config) -> None:
    """Refuse short rows before any work."""
    for index, row in enumerate(rows):
        if len(row) < sum(config.protected):
            raise InvalidBatchError(
                f"row {index} has {len(row)} tokens, of which {config.protected[0]} at the beginning and "
                f"{config.protected[1]} at the end are protected. Protect fewer, or leave such short rows whole."
            )


def _ranked(mass: Mapping[int, np.ndarray], config: Config) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each layer of one row the tokens by priority, and the share of importance that the first of them retain."""
    orders, curves = [], []
    for layer, observed in mass.items():
        importance = _importance(observed, layer, config)
        orders.append(priority(importance, *config.protected))
        curves.append(retained_mass(importance, orders[-1]))
    return orders, curves


def _importance(mass: np.ndarray, layer: int, config: Config) -> np.ndarray:
    tokens = mass.size
    if config.score == "normalized":
        return mass / (tokens - np.arange(tokens))
    if config.score == "window":
        padded = np.pad(mass, _POOLED // 2)
        return np.convolve(padded, np.full(_POOLED, 1 / _POOLED), mode="valid")
    if config.score == "recent":
        return np.arange(1.0, tokens + 1)
    if config.score == "random":
        return np.random.default_rng(stream_seed(config.seed, "prefix-kv", layer)).random(tokens)
    return mass


def _sizes(layers: Sequence[int], curves: Sequence[np.ndarray], config: Config, profile: Profile | None) -> np.ndarray:
    """Tokens that each layer keeps of one row."""
    tokens, least = curves[0].size - 1, sum(config.protected)
    total = total_tokens(config.keep, len(layers), tokens, least)
    if profile is not None:
        return proportional(profile.of(layers, config.keep), tokens, total, least)
    if config.allocation == "waterline":
        return waterline(curves, total, least)
    weights = pyramid(len(layers)) if config.allocation == "pyramid" else [1.0] * len(layers)
    return proportional(weights, tokens, total, least)
