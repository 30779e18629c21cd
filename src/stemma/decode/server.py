"""Sampling by a generation server: vLLM or SGLang over HTTP, token ids in and token ids out.

Text never travels: prompts are sent as ids, and the ids that were sampled come back with their log-probabilities, so
nothing is tokenised twice. Each continuation is one request with a seed of its own; the server's prefix cache is what
keeps a prompt from being encoded again for each of them.

Dialects:

- `vllm` (0.11 or newer): `POST /v1/completions` with `return_token_ids`. vLLM reports log-probabilities before
  temperature unless it was started with `--logprobs-mode processed_logprobs`; another temperature than 1 (or 0)
  therefore needs that, and `processed_logprobs=True` to say so.
- `sglang`: its own `POST /generate`. Seeds count only with `--enable-deterministic-inference`. Its
  log-probabilities are those at the sampling temperature, unless `SGLANG_RETURN_ORIGINAL_LOGPROB` is set for it.

With `weights="sync"` the server gets the policy's weights before it samples: they are written to a folder that the
server can read too, which it is told to load: SGLang by `/update_weights_from_disk`, vLLM by `/collective_rpc` with
`reload_weights` (a version in which that takes `weights_path`, started with `VLLM_SERVER_DEV_MODE=1`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from stemma.decode.json_client import JsonClient
from stemma.decode.rollout import Forced, Rollouts, check_counts, checked_forced
from stemma.decode.sampling import TokenSampler
from stemma.errors import ServerError, UnsupportedModelError
from stemma.files import replacing
from stemma.models.limits import check_prompts, vocabulary_size
from stemma.models.tokens import as_id_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ServerGenerator"]

_LOADED = "loaded"
"""File in a folder of weights, written when the server has loaded them."""

_ROUNDING = 1e-4
"""Log-probabilities above 0 by no more than this are 0, as a server computes it."""


class _Sampled(NamedTuple):
    """One continuation as a server gave it."""

    ids: list[int]
    logprobs: list[float]
    reason: Any


@dataclass(eq=False)
class ServerGenerator:
    """A `stemma.decode.rollout.Generator` behind which a server samples.

    The log-probabilities of forced tokens are NaN (the server does not score them), and no token goes through a model
    of this process, so `prefilled_tokens` and `decoded_tokens` are 0.

    Attributes:
        url: root of the server, such as `http://localhost:8000`.
        weights: "sync" sends the weights to the server whenever they have changed; "fixed" leaves it with those that it
            has. Samples of weights that lag behind are off-policy: train on them with importance correction only.
        eos_token_id: the id (or ids) that ends a row; None lets every row run to its end. SGLang also ends rows at the
            end-of-sequence tokens of its own tokenizer.
        dialect: which server it is, "vllm" or "sglang".
        weights_dir: folder for the weights of this run, on a disk that all processes and the server share; with "sync"
            only.
        model: name of the model on a vLLM server that serves several.
        temperature, top_p, top_k: as in `generate_groups`.
        stop_strings: a row ends with the token that completes one of them.
        processed_logprobs: the vLLM server was started with `--logprobs-mode processed_logprobs`, which reports
            log-probabilities after temperature, `top_k` and `top_p`.
        api_key: sent as bearer token.
        timeout: seconds that a request may take.
        max_concurrency: most requests under way at a time.
        retries: how often a request is sent again after a failed connection, at growing intervals.
    """

    url: str
    _: KW_ONLY
    weights: Literal["sync", "fixed"]
    eos_token_id: int | Sequence[int] | None
    dialect: Literal["vllm", "sglang"] = "vllm"
    weights_dir: str | os.PathLike[str] | None = None
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: str | Sequence[str] | None = None
    processed_logprobs: bool = False
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    max_concurrency: int = 64
    retries: int = 4

    def __post_init__(self) -> None:
        TokenSampler(self.temperature, self.top_p, self.top_k)
        check_counts(max_concurrency=self.max_concurrency)
        if self.dialect not in ("vllm", "sglang"):
            raise ValueError(f"dialect must be 'vllm' or 'sglang', got {self.dialect!r}")
        if self.weights not in ("sync", "fixed") or (self.weights == "sync") != (self.weights_dir is not None):
            raise ValueError(
                "weights must be 'sync' with a weights_dir that the server can read, or 'fixed' without one, got "
                f"weights={self.weights!r}, weights_dir={self.weights_dir!r}"
            )
        if self.processed_logprobs and self.dialect != "vllm":
            raise ValueError("processed_logprobs tells how a vLLM server was started; leave it out for other dialects")
        if self.dialect == "vllm" and self.temperature not in (0, 1) and not self.processed_logprobs:
            raise ValueError(
                f"temperature={self.temperature} with a vLLM server, which reports log-probabilities at temperature 1 "
                "unless told otherwise: start it with --logprobs-mode processed_logprobs and pass "
                "processed_logprobs=True"
            )
        self._client = JsonClient(
            url=self.url.rstrip("/").removesuffix("/v1"),
            api_key=self.api_key,
            timeout=self.timeout,
            retries=self.retries,
        )
        self._eos_ids = as_id_list(self.eos_token_id)
        strings = self.stop_strings or []
        self._stop = [strings] if isinstance(strings, str) else list(strings)
        self._loaded: Path | None = None  # the folder of the weights that the server has
        self._created = time.time()

    # ------------------------------------------------------------------ sampling

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        num_generations: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
        forced: Forced | None = None,
    ) -> Rollouts:
        """Continuations of every prompt; the arguments are those of `generate_groups`.

        Raises:
            InvalidBatchError: prompts or beginnings, as in `generate_groups`.
            ServerError: see there.
            UnsupportedModelError: weights that cannot be sent, see `sync`.
        """
        check_counts(num_generations=num_generations, max_new_tokens=max_new_tokens)
        prompt_ids = [[int(token) for token in prompt] for prompt in prompts]
        check_prompts(model, prompt_ids, max_new_tokens)
        vocab_size = vocabulary_size(model)
        beginnings = checked_forced(forced, len(prompt_ids), num_generations, max_new_tokens, self._eos_ids, vocab_size)
        if self.weights == "sync":
            self.sync(model)

        def one(row: tuple[list[int], list[int], int]) -> _Sampled | None:
            prompt, beginning, row_seed = row
            remaining = max_new_tokens - len(beginning)
            if not remaining or (beginning and beginning[-1] in self._eos_ids):
                return None
            return self._sample(prompt + beginning, remaining, row_seed, vocab_size)

        seeds = _row_seeds(seed, len(prompt_ids), num_generations)
        rows = [
            (prompt, beginning, row_seed)
            for prompt, group, row_seeds in zip(prompt_ids, beginnings, seeds, strict=True)
            for beginning, row_seed in zip(group, row_seeds, strict=True)
        ]
        executor = ThreadPoolExecutor(self.max_concurrency)
        try:
            sampled = list(executor.map(one, rows))
        finally:
            executor.shutdown(cancel_futures=True)

        completions, logprobs, finished = [], [], []
        for (_, beginning, _), row in zip(rows, sampled, strict=True):
            ids, values, reason = row or _Sampled([], [], "stop")
            completions.append(beginning + ids)
            logprobs.append(torch.tensor([math.nan] * len(beginning) + values))
            finished.append(reason == "stop" if row else beginning[-1] in self._eos_ids)
        groups = [slice(start, start + num_generations) for start in range(0, len(rows), num_generations)]
        return Rollouts(
            prompts=prompt_ids,
            completions=[completions[group] for group in groups],
            logprobs=[logprobs[group] for group in groups],
            finished=[finished[group] for group in groups],
            forced_lengths=[[len(ids) for ids in group] for group in beginnings],
            prefilled_tokens=0,
            decoded_tokens=0,
        )

    def _sample(self, ids: list[int], max_tokens: int, seed: int, vocab_size: int) -> _Sampled:
        """Continue one row; the answer is checked to be what was asked for."""
        ask, read = (self._vllm, _read_vllm) if self.dialect == "vllm" else (self._sglang, _read_sglang)
        answer = self._client.post(*ask(ids, max_tokens, seed))
        try:
            row = read(answer, ids)
        except ServerError as error:
            raise ServerError(f"{self.url} {error}: {_excerpt(answer)}") from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} did not answer as {self.dialect} does: {_excerpt(answer)}") from error
        if row.reason not in ("stop", "length"):
            raise ServerError(f"{self.url} ended a continuation with {row.reason!r}, expected 'stop' or 'length'")
        if not 0 < len(row.ids) <= max_tokens:
            raise ServerError(f"{self.url} returned {len(row.ids)} token ids, expected 1 to {max_tokens}")
        outside = [token for token in row.ids if type(token) is not int or not 0 <= token < vocab_size]
        if outside:
            raise ServerError(
                f"{self.url} sampled token id {outside[0]}, outside the model's vocabulary of {vocab_size}; does it "
                "serve the model that is trained?"
            )
        if not set(self._eos_ids).isdisjoint(row.ids[:-1]):
            raise ServerError(f"{self.url} went on behind an end-of-sequence token, one of {self._eos_ids}")
        known = [value for value in row.logprobs if type(value) in (int, float) and -1e30 < value < 1e30]
        if len(known) != len(row.ids):
            raise ServerError(
                f"{self.url} returned {len(known)} log-probabilities for {len(row.ids)} tokens; expected one each"
            )
        if max(known) > _ROUNDING:
            raise ServerError(f"{self.url} returned a log-probability of {max(known)}; none is above 0")
        if row.reason == "length" and len(row.ids) < max_tokens:
            raise ServerError(f"{self.url} cut a row off after {len(row.ids)} of {max_tokens} tokens; raise its limit")
        return row

    def _vllm(self, ids: list[int], max_tokens: int, seed: int) -> tuple[str, dict[str, Any]]:
        body = {
            "prompt": ids,
            "max_tokens": max_tokens,
            "n": 1,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,  # the ids below decide, not what else the server takes for an end
            "stop_token_ids": self._eos_ids,
            "stop": self._stop,
            **self._sampling(),
        }
        return "/v1/completions", body | ({"model": self.model} if self.model else {})

    def _sglang(self, ids: list[int], max_tokens: int, seed: int) -> tuple[str, dict[str, Any]]:
        sampling = {
            "max_new_tokens": max_tokens,
            "n": 1,
            "sampling_seed": seed,
            "ignore_eos": not self._eos_ids,  # it would ignore stop_token_ids as well
            "stop_token_ids": self._eos_ids,
            "stop": self._stop,
            **self._sampling(),
        }
        return "/generate", {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}

    def _sampling(self) -> dict[str, Any]:
        """Sampling options by the names of both dialects; all are given, for a server may have defaults of its own."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
        }

    # ------------------------------------------------------------------ weights

    def sync(self, model: PreTrainedModel) -> None:
        """Let the server load the model's weights, unless it has them already.

        Process 0 sends them; another process waits until process 0 has sent the weights that it holds itself.

        Raises:
            ServerError: the server did not load them, or process 0 did not send them in time.
            UnsupportedModelError: a PEFT model, whose merged weights the server would need.
        """
        if hasattr(model, "peft_config"):
            raise UnsupportedModelError(
                "weights='sync' sends whole models, and this one has PEFT adapters; sample with LocalGenerator, "
                "or with weights='fixed' and importance correction"
            )
        assert self.weights_dir is not None
        folder = Path(self.weights_dir).resolve() / f"weights-{_digest(model)}"
        if folder == self._loaded:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank():
            self._wait_for(folder)
        else:
            self._load(model, folder)
            if self._loaded is not None:
                shutil.rmtree(self._loaded, ignore_errors=True)
        self._loaded = folder

    def _wait_for(self, folder: Path) -> None:
        # Not a collective: processes may call a generator differently often, where one has nothing to sample.
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            try:
                # A mark from before this run says nothing about the server of today; file times are coarse.
                if (folder / _LOADED).stat().st_mtime > self._created - 1:
                    return
            except FileNotFoundError:
                pass
            time.sleep(0.02)
        raise ServerError(
            f"process 0 did not send the weights within timeout={self.timeout} seconds (no {folder / _LOADED}): "
            "it failed, weights_dir is another folder there, or the processes hold different weights"
        )

    def _load(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the weights to a new folder (a server may keep the old files mapped) and have the server load them."""
        if not folder.exists():
            with replacing(folder) as temporary:
                model.save_pretrained(temporary)
        if self.dialect == "sglang":
            answer = self._client.post("/update_weights_from_disk", {"model_path": str(folder)})
            if answer.get("success") is not True:
                raise ServerError(f"{self.url} did not load the weights in {folder}: {_excerpt(answer)}")
        else:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": self.timeout}
            hint = "; start vLLM with VLLM_SERVER_DEV_MODE=1, in a version whose reload_weights takes weights_path"
            self._client.post("/collective_rpc", call, hint=hint)
            self._client.post("/reset_prefix_cache", {}, hint=hint)  # its entries come from the weights before
        (folder / _LOADED).touch()


def _read_vllm(answer: dict[str, Any], ids: list[int]) -> _Sampled:
    """The continuation of the prompt `ids` in vLLM's answer. Its errors go on after the server's address."""
    choices = answer.get("choices") or []
    if len(choices) != 1:
        raise ServerError(f"returned {len(choices)} choices, expected 1")
    choice = choices[0]
    if choice.get("token_ids") is None:
        raise ServerError(
            "returned no token ids; use vLLM 0.11 or newer, which knows the option return_token_ids, or "
            "dialect='sglang' for an SGLang server"
        )
    returned = choice.get("prompt_token_ids")
    if returned is not None and returned != ids:
        raise ServerError(
            f"continued a prompt of {len(returned)} token ids that is not the one of {len(ids)} that it was sent; "
            "switch off truncation and prompt templates on the server"
        )
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if logprobs is None:
        raise ServerError("returned no log-probabilities; start vLLM with --max-logprobs of at least 1")
    return _Sampled([*choice["token_ids"]], [*logprobs], choice.get("finish_reason"))


def _read_sglang(answer: dict[str, Any], ids: list[int]) -> _Sampled:
    """The continuation of the prompt `ids` in SGLang's answer. Its errors go on after the server's address."""
    meta = answer.get("meta_info") or {}
    tokens = meta.get("output_token_logprobs")
    if tokens is None:
        raise ServerError("returned no meta_info.output_token_logprobs")
    if meta.get("prompt_tokens", len(ids)) != len(ids):
        raise ServerError(
            f"continued a prompt of {meta['prompt_tokens']} token ids, but was sent {len(ids)}; switch off truncation "
            "on the server"
        )
    reason = (meta.get("finish_reason") or {}).get("type")
    return _Sampled([token for _, token, *_ in tokens], [value for value, *_ in tokens], reason)


def _row_seeds(seed: int | Sequence[int], num_prompts: int, num_generations: int) -> list[list[int]]:
    """A seed below 2**31 for every continuation; with one seed per prompt, those of a prompt depend on it alone."""

    def draw(source: int, *shape: int) -> Tensor:
        return torch.randint(2**31, shape, generator=torch.Generator().manual_seed(source))

    if isinstance(seed, int):
        return draw(seed, num_prompts, num_generations).tolist()
    if len(seed) != num_prompts:
        raise ValueError(f"seed must be one number or one for each of the {num_prompts} prompts, got {len(seed)}")
    return [draw(source, num_generations).tolist() for source in seed]


def _digest(model: PreTrainedModel) -> str:
    """A name for the weights, from two sums over every parameter: others have, for all practical purposes, another."""
    with torch.no_grad():
        sums = [
            torch.stack([parameter.sum(dtype=torch.float64), parameter.norm(dtype=torch.float64)])
            for parameter in model.parameters()
        ]
    return hashlib.blake2b(torch.cat(sums).cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _excerpt(answer: dict[str, Any]) -> str:
    return json.dumps(answer)[:500]
