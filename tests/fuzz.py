"""Random trees, models and settings, scored over the tree and each row alone: `python tests/fuzz.py CASES SEED`.

A case draws an architecture, a window, a precision, LoRA or none, training or evaluation mode, a way to score (shared,
streamed, plain, automatic), a temperature, and a tree. What both give is compared with each row alone in float64, so
that the plain forward of the same precision says how much of a difference is rounding. `tests/scoring/test_fuzz.py`
runs a few.
"""

import copy
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

import stemma
from decoders import KINDS, SIZES, V, keep_double
from stemma.models.tiny import tiny_model
from stemma.scoring.forward import ForwardSettings, plain_forward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = (("shared", False), ("shared", True), ("auto", False), ("auto", True), ("plain", True))


@dataclass(frozen=True)
class Case:
    """One draw."""

    kind: str
    dtype: torch.dtype
    window: int | None
    lora: bool
    training: bool
    mode: str
    max_tokens: int | None
    temperature: float
    min_shared: int
    rows: tuple[tuple[int, ...], ...]
    seed: int

    @classmethod
    def of(cls, seed: int) -> "Case":
        """The case of a seed."""
        random = np.random.default_rng(seed)

        def pick(options: Any) -> Any:
            return options[int(random.integers(len(options)))]

        rows: list[tuple[int, ...]] = []
        for _ in range(int(random.integers(1, 9))):
            head = pick(rows)[: int(random.integers(0, 30))] if rows and random.random() < 0.8 else ()
            rows.append((*head, *random.integers(0, V, int(random.integers(1, 14))).tolist()))
        mode, budget = pick(MODES)
        return cls(
            kind=pick(list(KINDS)),
            dtype=pick(DTYPES),
            window=pick((3, 5, 9)),
            lora=bool(random.random() < 0.5),
            training=bool(random.random() < 0.5),
            mode=mode,
            max_tokens=int(random.integers(1, 50)) if budget else None,
            temperature=pick((1.0, 0.7)),
            min_shared=int(random.integers(1, 9)),
            rows=tuple(rows),
            seed=seed,
        )


def model_of(case: Case) -> torch.nn.Module:
    """The model of a case, not enabled, with weights that make attention matter."""
    model_type, extra = KINDS[case.kind]
    if "sliding_window" in extra:
        extra = extra | {"sliding_window": case.window}
    model = tiny_model(model_type, **SIZES, seed=0, dtype=torch.float32, **extra)
    torch.manual_seed(case.seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if case.lora:
        import peft

        targets = ["c_attn"] if model_type == "gpt2" else ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model.to(case.dtype).train(case.training)


Result = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities and the gradients of all parameters, one behind the other."""


def run(case: Case) -> tuple[Result, Result, Result]:
    """Of the case's way, of each row alone in its precision, and of each row alone in float64."""
    model = model_of(case)
    tree = stemma.PrefixTree.from_sequences([list(row) for row in case.rows], min_shared=case.min_shared)
    weights = torch.randn(int(tree.scored.sum()), generator=torch.Generator().manual_seed(case.seed)).double()

    def result(model: torch.nn.Module, logprobs: torch.Tensor) -> Result:
        model.zero_grad()
        (logprobs.double() * weights).sum().backward()
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
        return logprobs.detach().double(), torch.cat(gradients).double()

    def alone(model: torch.nn.Module) -> Result:
        settings = ForwardSettings(case.temperature)
        parts = [plain_forward(model, tree, np.array([row]), settings)[0] for row in range(tree.num_sequences)]
        return result(model, torch.cat(parts))

    exact = copy.deepcopy(model).double()
    with keep_double():
        truth = alone(exact)
    stemma.enable(model)
    with keep_double() if case.dtype == torch.float64 else nullcontext():
        plain = alone(model)
        scores = stemma.score(
            model,
            tree,
            mode=case.mode,
            max_tokens=case.max_tokens,
            temperature=case.temperature,  # type: ignore[arg-type]
        )
        return result(model, scores.logprobs), plain, truth


def errors(case: Case) -> tuple[float, float, float, float]:
    """Off float64: log-probabilities (root mean square, nats) of the way and of each row alone, and gradients so."""
    way, plain, truth = run(case)
    found = []
    for number in (0, 1):
        scale = 1.0 if number == 0 else float(truth[1].norm().clamp_min(1e-30)) / max(truth[1].numel(), 1) ** 0.5
        for got in (way, plain):
            found.append(float((got[number] - truth[number]).square().mean().sqrt()) / scale)
    return found[0], found[1], found[2], found[3]


def wrong(case: Case, found: tuple[float, float, float, float]) -> bool:
    """Whether the way is farther off than rounding: more than 4 times as far as each row alone, and some roundings more
    where there are few tokens. In float64, where norms keep it, nothing but 1e-12 is rounding."""
    floor = 1e-12 if case.dtype == torch.float64 else 20 * torch.finfo(case.dtype).eps
    return any(not way <= 4 * plain + floor for way, plain in (found[:2], found[2:]))


def main() -> int:
    """Print what is wrong, and totals."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2])
    failed, done, worst = 0, 0, dict.fromkeys(DTYPES, 0.0)
    for seed in range(first, first + count):
        case = Case.of(seed)
        if all(len(row) == 1 for row in case.rows):
            continue
        try:
            found = errors(case)
            bad = wrong(case, found)
        except Exception as error:
            found, bad = (0.0, 0.0, 0.0, 0.0), True
            print(f"{type(error).__name__}: {str(error)[:300]}")
        done += 1
        failed += bad
        ratio = found[0] if case.dtype == torch.float64 else found[0] / max(found[1], 1e-30)
        worst[case.dtype] = max(worst[case.dtype], ratio)
        if bad:
            print("WRONG", case, [f"{x:.1e}" for x in found], flush=True)
    print(f"{done} cases, {failed} wrong; largest error of float64 {worst.pop(torch.float64):.1e} nats;")
    print(
        "largest ratio of errors, way to row alone:",
        ", ".join(f"{str(dtype)[6:]} {ratio:.2f}" for dtype, ratio in worst.items()),
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
