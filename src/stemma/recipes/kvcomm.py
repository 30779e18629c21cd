"""`stemma run kvcomm`: three agents that pass texts to each other, with and without encoding them again.

The paper (8B models): more than 70% of prefills reused without loss of quality, and the first token up to 7.8 times as
soon. Here: the base model, three agents whose templates put a question, a chunk of unseen library source and another
agent's answer in different places. Problems come one after the other; every prefill that reuses is compared on the spot
with the dense prefill of the same prompt, which the pool never sees, by the next-byte distributions along a
continuation. The same prompts are estimated in other ways too. All tokens that run through the model are counted,
those of anchors and of texts encoded alone included.
"""

import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stemma.cache.anchors import Deviation, Match
from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers, spread
from stemma.models.rotary import cached_states, plain_cache
from stemma.recipes._base_model import BaseModel, python_base
from stemma.recipes._kvcomm_report import ALIGNED, BLEND, BOTH, MEAN, ONE, OURS, PUBLISHED, UNMOVED, WRONG, KVCommReport
from stemma.recipes._runs import Options, Runs
from stemma.serve.kvcomm import Agent, Config, Content, KVComm, Prefill
from stemma.serve.kvcomm.recompute import key_errors, recompute, second_layer
from stemma.train.seeds import stream_seed

__all__ = ["run"]

_TEMPLATES = {
    "reader": "# A reader looks at this module and answers a question.\n{document}\n# Question: {question}\n# Answer: ",
    "critic": '"""Review of an answer that was given to a colleague.\n\nBe brief and fair."""\n'
    'QUESTION = "{question}"\n# It is about\n{document}\nANSWER = "{answer}"\nVERDICT = "',
    "writer": 'import textwrap\n\n\nclass Summary:\n    """Of what was read and said."""\n\n'
    '    source = """\n{document}\n"""\n    said = "{answer}"\n    summary = "',
}
_SHARE = 0.15
"""Of tokens that are computed anew."""


def run(options: Options) -> dict[str, Any]:
    """Run it; see `stemma.recipes._report.Report.write` for what is returned."""
    quick, base = options.quick, python_base(options)
    seeds = options.seeds or (1 if quick else 3)
    problems, document, lengths = (6, 64, (64, 128)) if quick else (72, 256, (128, 256, 512, 1024))
    least = 3 if quick else 12
    rules = {
        OURS: Config(header="\n", min_anchors=least),
        PUBLISHED: Config(header="\n", min_anchors=2, sharpness=None),
    }
    about = {
        "model": f"byte-level Llama of {base.parameters:,} parameters trained on library sources",
        "problems": f"{problems} per seed, three agents each",
        "texts": f"chunk of {document} bytes, question of 40, sampled answer of 24",
        "compared": "16 next-byte distributions behind every prompt that was reused",
        "pool": f"at most 20 anchors of each text, {least} before anything is reused",
        "seeds": seeds,
    }
    report = KVCommReport("kvcomm", "KVCOMM: texts that agents pass to each other", about, lengths)
    runs = Runs(options.folder / "runs" / "kvcomm")
    known = {"model": base.folder.name, "problems": problems, "document": document, "templates": _TEMPLATES}
    for seed in range(seeds):
        for rule, config in rules.items():
            setting = {**known, "config": repr(config)}
            report.streams.setdefault(rule, []).append(
                runs(rule, seed, setting, partial(_stream, base, config, rule, problems, document, seed))
            )
        for length in lengths:
            setting = {"model": base.folder.name, "document": length, "config": repr(rules[OURS]), "blend": _SHARE}
            run = runs(
                "first token", seed, setting, partial(_first_token, base, length, seed, *((2, 1) if quick else (8, 9)))
            )
            report.times.setdefault(length, []).append(run)
    report.summarise()
    return report.write(options.folder)


# ---------------------------------------------------------------------- the workload


def _texts(base: BaseModel, count: int, length: int, seed: int) -> list[dict[str, Content]]:
    """Documents and questions of so many problems, from files that the model has not seen."""
    found = []
    documents = base.rows("test", count, length, seed=stream_seed(seed, "documents"))
    questions = base.rows("validation", count, 40, seed=stream_seed(seed, "questions"))
    for document, question in zip(documents.tolist(), questions.tolist(), strict=True):
        line = [32 if byte in b"\n\r" else byte for byte in question]
        found.append({"document": Content(tuple(document), None), "question": Content(tuple(line), None)})
    return found


def _answer(base: BaseModel, agent: Agent, prefill: Prefill, seed: int) -> Content:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cache = prefill.cache
        row = base.model.generate(
            **prefill.inputs, past_key_values=cache, max_new_tokens=24, do_sample=True, eos_token_id=None
        )
    return agent.answer(prefill, row)


def _agents(base: BaseModel, config: Config) -> dict[str, Agent]:
    comm = KVComm(base.model, base.tokenizer, config=config)
    return {name: comm.agent(name, template) for name, template in _TEMPLATES.items()}


def _given(agent: Agent, texts: Mapping[str, Content]) -> dict[str, Content]:
    return {name: texts[name] for name in agent.template.names}


def _stream(base: BaseModel, config: Config, rule: str, problems: int, document: int, seed: int) -> dict[str, Any]:
    """Problems one after the other; divergences of every reused prefill, by way of estimating."""
    agents = _agents(base, config)
    modes, computed, dense = [], 0, 0
    found: dict[str, list[list[float]]] = {}
    signs: list[list[float]] = []
    for number, texts in enumerate(_texts(base, problems, document, seed)):
        for name, agent in agents.items():
            given = _given(agent, texts)
            prefill = agent.prefill(given)
            modes.append(prefill.mode)
            computed += prefill.usage.computed + prefill.usage.encoded
            dense += prefill.usage.prompt - prefill.usage.exact
            if prefill.mode == "reuse":
                ways = _ways(base, agents, name, given, prefill) if rule == OURS else {}
                ways |= {OURS: cached_states(prefill.cache), ALIGNED: _cut(agent.assemble(given, {}), prefill)}
                off = _compare(base, agent, given, prefill, ways)
                for way, pair in off.items():
                    found.setdefault(way, []).append(pair)
                entropy = max(spread(near) for near in _likeness(agent, given))
                signs.append([entropy, _second_layer_error(base, agent, prefill), off[OURS][0]])
            if name == "reader":
                texts["answer"] = _answer(base, agent, prefill, stream_seed(seed, "answer", number))
    return {
        "reused": sum(mode == "reuse" for mode in modes) / len(modes),
        "reused_later": statistics.fmean(mode == "reuse" for mode in modes[len(modes) // 2 :]),
        "computed": computed / dense,
        "found": {
            way: [statistics.fmean(column) for column in zip(*pairs, strict=True)] for way, pairs in found.items()
        },
        "signs": signs,
        "compared": len(signs),
    }


def _likeness(agent: Agent, given: Mapping[str, Content]) -> list[Tensor]:
    plans = [agent.plan(place, content) for place, content in given.items()]
    return [plan.closeness for plan in plans if plan.closeness is not None]


# ---------------------------------------------------------------------- ways to estimate


def _ways(
    base: BaseModel, agents: Mapping[str, Agent], name: str, given: Mapping[str, Content], prefill: Prefill
) -> dict[str, Layers]:
    """Keys and values of one prompt, estimated in every other way."""
    agent, pool = agents[name], agents[name].comm.pool
    anchors = {
        place: same if (same := [a for a in known if a.ids == content.ids]) else known
        for place, content in given.items()
        for known in [pool.eligible(place, len(content.ids), content.origin)]
    }
    own = {place: pool.matches(known, name) for place, known in anchors.items()}
    others = {
        place: tuple(
            Match(match.anchor, Deviation(match.deviation.content, None))
            for other in agents
            if other != name
            for match in pool.matches(known, other)
        )
        for place, known in anchors.items()
    }
    estimates = {
        UNMOVED: agent.assemble(given, {}, move=False),
        ALIGNED: agent.assemble(given, {}),
        MEAN: agent.assemble(given, own, weighting="mean"),
        WRONG: agent.assemble(given, others),
        ONE: agent.assemble(given, {place: known[:1] for place, known in own.items()}),
    }
    found = {way: _cut(states, prefill) for way, states in estimates.items()}
    found[BLEND] = _blend(base, agent, prefill, found[ALIGNED])
    found[BOTH] = _blend(base, agent, prefill, cached_states(prefill.cache))
    return found


def _blend(base: BaseModel, agent: Agent, prefill: Prefill, states: Layers) -> Layers:
    positions = torch.arange(prefill.usage.exact, len(prefill.ids) - 1)
    errors = key_errors(second_layer(base.model, prefill.ids, positions, states), states[1], positions)
    worst = errors.topk(round(_SHARE * positions.numel())).indices.sort().values
    return recompute(base.model, prefill.ids, positions[worst], states)


def _cut(states: Layers, prefill: Prefill) -> Layers:
    last = len(prefill.ids) - 1
    return tuple(KeyValues(key[:, :, :last], value[:, :, :last]) for key, value in states)


def _second_layer_error(base: BaseModel, agent: Agent, prefill: Prefill) -> float:
    positions = torch.linspace(prefill.usage.exact, len(prefill.ids) - 2, 16).long().unique()
    states = cached_states(prefill.cache, 0, len(prefill.ids) - 1)
    return float(key_errors(second_layer(base.model, prefill.ids, positions, states), states[1], positions).mean())


@torch.no_grad()
def _compare(
    base: BaseModel, agent: Agent, given: Mapping[str, Content], prefill: Prefill, ways: Mapping[str, Layers]
) -> dict[str, list[float]]:
    """Divergence from dense prefill in nats, and agreement of the most likely byte, along the dense continuation."""
    dense = agent.prefill(given, mode="dense")
    states = cached_states(dense.cache)
    row = base.model.generate(
        **dense.inputs, past_key_values=plain_cache(states), max_new_tokens=16, do_sample=False, eos_token_id=None
    )[0]
    last = len(dense.ids) - 1

    def read(layers: Layers) -> Tensor:
        positions = torch.arange(last, len(row) - 1)[None]
        output = base.model(row[None, last:-1], position_ids=positions, past_key_values=plain_cache(layers))
        return output.logits[0].log_softmax(-1)

    true, found = read(states), {}
    for way, layers in ways.items():
        other = read(tuple(KeyValues(key[:, :, :last], value[:, :, :last]) for key, value in layers))
        divergence = float((true.exp() * (true - other)).sum(-1).mean())
        found[way] = [divergence, float((true.argmax(-1) == other.argmax(-1)).float().mean())]
    return found


# ---------------------------------------------------------------------- time to the first token


def _first_token(base: BaseModel, length: int, seed: int, anchors: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of the thread until the first new token is known, for the critic; prompt tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    agents = _agents(base, Config(header="\n", min_anchors=1, recompute=_SHARE))
    problems = _texts(base, anchors + 1, length, seed)
    for number, texts in enumerate(problems):
        prefill = agents["reader"].prefill(_given(agents["reader"], texts), mode="dense")
        texts["answer"] = _answer(base, agents["reader"], prefill, stream_seed(seed, "answer", number))
    critic, last = agents["critic"], problems.pop()
    for texts in problems:
        critic.prefill(_given(critic, texts), mode="learn")
    given = _given(critic, last)
    seconds: dict[str, list[float]] = {"dense": [], "reuse": [], "blend": [], "alone": []}
    for _ in range(repeats):
        for mode in ("dense", "reuse", "blend"):
            seconds[mode].append(_timed(base, critic, given, mode))
        new = {name: Content(text.ids, None) if text.origin == "alone" else text for name, text in given.items()}
        seconds["alone"].append(_timed(base, critic, new, "reuse"))
    torch.set_num_threads(threads)
    prompt = sum(len(content.ids) for content in given.values()) + sum(map(len, critic.pieces))
    return {"first_token": {mode: statistics.median(values) for mode, values in seconds.items()}, "prompt": prompt}


@torch.no_grad()
def _timed(base: BaseModel, agent: Agent, given: Mapping[str, Content], mode: Any) -> float:
    begin = time.thread_time()
    prefill = agent.prefill(given, mode=mode)
    last = len(prefill.ids) - 1
    inputs = torch.tensor([prefill.ids[last:]])
    base.model(inputs, position_ids=torch.tensor([[last]]), past_key_values=prefill.cache).logits.argmax()
    return time.thread_time() - begin
