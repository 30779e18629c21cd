"""`stemma run kvcomm`: three agents that pass texts to each other, with and without encoding them again.

The paper (8B models): more than 70% of prefills reused without loss of quality, and the first token up to 7.8 times as
soon. Here: the base model, three agents whose templates put a question, a chunk of unseen library source and another
agent's answer in different places. Problems come one after the other; every prefill that reuses is compared on the spot
with the dense prefill of the same prompt, which the pool never sees, by the next-byte distributions along a
continuation. The same prompts are estimated in other ways too. All tokens that run through the model are counted,
those of anchors and of texts encoded alone included. With `--model` one stream runs on a pretrained model, each problem
a seed, without times.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stemma.cache.anchors import Deviation, Match
from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers, spread
from stemma.models.rotary import cached_states, plain_cache
from stemma.recipes._base_model import BaseModel, GivenModel, python_base
from stemma.recipes._report import Report
from stemma.recipes._runs import Options, Runs
from stemma.recipes._statistics import mean_and_error
from stemma.serve.kvcomm import Agent, Config, Content, KVComm, Prefill
from stemma.serve.kvcomm.recompute import key_errors, recompute, second_layer
from stemma.train.seeds import stream_seed

__all__ = ["run"]

UNMOVED, ALIGNED, OURS, MEAN = "no re-positioning", "re-aligned, no offsets", "KVCOMM", "mean of all offsets"
WRONG, ONE, BLEND, BOTH = "another agent's offsets", "one anchor", "CacheBlend-like", "KVCOMM and CacheBlend"
WAYS = (UNMOVED, ALIGNED, OURS, MEAN, WRONG, ONE, BLEND, BOTH)
PUBLISHED = "published rule"
_TIMED = {"reuse": "texts known", "blend": "texts known, 15% computed anew", "alone": "question and chunk new"}
Model = BaseModel | GivenModel
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
    quick, given = options.quick, options.model is not None
    base = GivenModel.load(options.model) if options.model else python_base(options)
    seeds = options.seeds or (1 if quick or given else 5)
    problems, document, least = (6, 64, 3) if quick else (16, 128, 8) if given else (72, 256, 12)
    lengths = () if given else (64, 128) if quick else (128, 256, 512, 1024)
    rules = {
        OURS: Config(header="\n", min_anchors=least, recompute=0),
        PUBLISHED: Config(header="\n", min_anchors=2, sharpness=None, recompute=0),
    }
    if given:
        del rules[PUBLISHED]
    about = {
        "model": base.about,
        "problems": f"{problems} per seed, three agents each",
        "texts": f"chunk of {document} {base.unit}s, question of {_question(base)}, sampled answer of 24",
        "compared": f"16 next-{base.unit} distributions behind every prompt that was reused",
        "pool": f"at most 20 anchors of each text, {least} before anything is reused",
        "seeds": seeds,
    }
    report = _Report("kvcomm", "KVCOMM: texts that agents pass to each other", about, lengths)
    report.unit = base.unit
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


def _question(base: Model) -> int:
    return 40 if base.unit == "byte" else 16


def _texts(base: Model, count: int, length: int, seed: int) -> list[dict[str, Content]]:
    """Documents and questions of so many problems, from files that the model has not seen."""
    found = []
    documents = base.rows("test", count, length, seed=stream_seed(seed, "documents"))
    questions = base.rows("validation", count, _question(base), seed=stream_seed(seed, "questions"))
    for document, question in zip(documents.tolist(), questions.tolist(), strict=True):
        line = [32 if base.unit == "byte" and token in b"\n\r" else token for token in question]
        found.append({"document": Content(tuple(document), None), "question": Content(tuple(line), None)})
    return found


def _answer(base: Model, agent: Agent, prefill: Prefill, seed: int) -> Content:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cache = prefill.cache
        row = base.model.generate(
            **prefill.inputs, past_key_values=cache, max_new_tokens=24, do_sample=True, eos_token_id=None
        )
    return agent.answer(prefill, row)


def _agents(base: Model, config: Config) -> dict[str, Agent]:
    comm = KVComm(base.model, base.tokenizer, config=config)
    return {name: comm.agent(name, template) for name, template in _TEMPLATES.items()}


def _given(agent: Agent, texts: Mapping[str, Content]) -> dict[str, Content]:
    return {name: texts[name] for name in agent.template.names}


def _stream(base: Model, config: Config, rule: str, problems: int, document: int, seed: int) -> dict[str, Any]:
    """Problems one after the other; divergences of every reused prefill, by way of estimating."""
    agents = _agents(base, config)
    modes, computed, dense = [], 0, 0
    found: dict[str, list[tuple[int, str, list[float]]]] = {}
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
                    found.setdefault(way, []).append((number, name, pair))
                entropy = max(spread(near) for near in _likeness(agent, given))
                signs.append([entropy, _second_layer_error(base, agent, prefill), off[OURS][0]])
            if name == "reader":
                texts["answer"] = _answer(base, agent, prefill, stream_seed(seed, "answer", number))
    return {
        "reused": sum(mode == "reuse" for mode in modes) / len(modes),
        "reused_later": statistics.fmean(mode == "reuse" for mode in modes[len(modes) // 2 :]),
        "computed": computed / dense,
        "found": {way: _means([pair for _, _, pair in each]) for way, each in found.items()},
        "each": found,
        "signs": signs,
        "compared": len(signs),
    }


def _means(pairs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*pairs, strict=True)]


def _likeness(agent: Agent, given: Mapping[str, Content]) -> list[Tensor]:
    plans = [agent.plan(place, content) for place, content in given.items()]
    return [plan.closeness for plan in plans if plan.closeness is not None]


# ---------------------------------------------------------------------- ways to estimate


def _ways(
    base: Model, agents: Mapping[str, Agent], name: str, given: Mapping[str, Content], prefill: Prefill
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


def _blend(base: Model, agent: Agent, prefill: Prefill, states: Layers) -> Layers:
    positions = torch.arange(prefill.usage.exact, len(prefill.ids) - 1)
    errors = key_errors(second_layer(base.model, prefill.ids, positions, states), states[1], positions)
    worst = errors.topk(round(_SHARE * positions.numel())).indices.sort().values
    return recompute(base.model, prefill.ids, positions[worst], states)


def _cut(states: Layers, prefill: Prefill) -> Layers:
    last = len(prefill.ids) - 1
    return tuple(KeyValues(key[:, :, :last], value[:, :, :last]) for key, value in states)


def _second_layer_error(base: Model, agent: Agent, prefill: Prefill) -> float:
    positions = torch.linspace(prefill.usage.exact, len(prefill.ids) - 2, 16).long().unique()
    states = cached_states(prefill.cache, 0, len(prefill.ids) - 1)
    return float(key_errors(second_layer(base.model, prefill.ids, positions, states), states[1], positions).mean())


@torch.no_grad()
def _compare(
    base: Model, agent: Agent, given: Mapping[str, Content], prefill: Prefill, ways: Mapping[str, Layers]
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


def _first_token(base: Model, length: int, seed: int, anchors: int, repeats: int) -> dict[str, Any]:
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
def _timed(base: Model, agent: Agent, given: Mapping[str, Content], mode: Any) -> float:
    begin = time.thread_time()
    prefill = agent.prefill(given, mode=mode)
    last = len(prefill.ids) - 1
    inputs = torch.tensor([prefill.ids[last:]])
    base.model(inputs, position_ids=torch.tensor([[last]]), past_key_values=prefill.cache).logits.argmax()
    return time.thread_time() - begin


# ---------------------------------------------------------------------- report


class _Report(Report):
    """The report of prefills compared, and of times by length."""

    caption = "divergence from dense prefill by way of estimating, and time to the first token"
    size = (10, 3.8)

    def __init__(self, name: str, title: str, about: dict[str, Any], lengths: Sequence[int]) -> None:
        super().__init__(name, title, about)
        self.lengths, self.unit = lengths, "byte"
        self.streams: dict[str, list[dict[str, Any]]] = {}
        self.times: dict[int, list[dict[str, Any]]] = {}

    def values(self, way: str, column: int, rule: str = OURS) -> list[float]:
        """Means of each seed, of one stream of each problem: divergence (column 0) or agreement (1)."""
        runs = [run for run in self.streams[rule] if way in run["found"]]
        if self.unit == "byte" or not runs:
            return [run["found"][way][column] for run in runs]
        numbers = dict.fromkeys(number for number, _, _ in runs[0]["each"][way])
        return [_means([p for n, _, p in runs[0]["each"][way] if n == number])[column] for number in numbers]

    def gains(self, length: int, how: str) -> list[float]:
        """Dense seconds over others, of each seed."""
        return [run["first_token"]["dense"] / run["first_token"][how] for run in self.times[length]]

    def summarise(self) -> None:
        """Reuse, divergences, times, and the claims."""
        for rule, runs in self.streams.items():
            for key, words in (
                ("reused", "share of prefills reused"),
                ("reused_later", "share of prefills reused, second half"),
                ("computed", "tokens run through the model, of those of dense prefills"),
            ):
                self.mean(rule, words, [run[key] for run in runs])
            self.record(rule, "prefills compared", sum(run["compared"] for run in runs), repeats=len(runs))
            pairs = zip(self.values(ALIGNED, 0, rule), self.values(OURS, 0, rule), strict=True)
            self.mean(rule, "divergence left, of that without offsets", [own / aligned for aligned, own in pairs])
        for way in WAYS:
            self.mean(
                way,
                "divergence from dense, all ways on the same prompts, 1/1000 nats",
                [1000 * v for v in self.values(way, 0)],
            )
            self.mean(way, f"most likely {self.unit} agrees, all ways on the same prompts", self.values(way, 1))
            for agent in _TEMPLATES if self.unit == "token" and self.values(way, 0) else ():
                own = [1000 * pair[0] for _, name, pair in self.streams[OURS][0]["each"][way] if name == agent]
                self.mean(way, f"divergence from dense, {agent}, 1/1000 nats", own)
        self._claims()
        signs = [sign for run in self.streams[OURS] for sign in run["signs"]]
        for column, words in enumerate(("entropy", "error of the second layer's keys")):
            if len(signs) > 2:
                value = _rank_correlation([s[column] for s in signs], [s[2] for s in signs])
                self.record(OURS, f"rank correlation of {words} with divergence", value, repeats=len(signs))
        for length in self.lengths:
            prompt = statistics.fmean(run["prompt"] for run in self.times[length])
            for how, words in _TIMED.items():
                name = f"first token, dense time over reused, chunk of {length} (prompt of {prompt:.0f})"
                self.mean(words, name, self.gains(length, how))

    def _claims(self) -> None:
        reused = [run["reused"] for run in self.streams.get(PUBLISHED, ())]
        self.claim(PUBLISHED, "share of prefills reused", reused, "more than 70% of prefills are reused", threshold=0.7)
        for other, own, claim in (
            (ALIGNED, OURS, "offsets bring reused states nearer to dense ones than re-positioning alone"),
            (MEAN, OURS, "anchors count by their likeness"),
            (WRONG, OURS, "each agent needs offsets of its own"),
            (OURS, BOTH, "computing some tokens anew brings them nearer still (CacheBlend)"),
            (BLEND, BOTH, "offsets help where some tokens are computed anew"),
        ):
            pairs = zip(self.values(other, 0), self.values(own, 0), strict=True)
            words = f"divergence, {other} − {own}, 1/1000 nats"
            self.claim(own, words, [1000 * (a - b) for a, b in pairs], claim)
        if not self.lengths:
            return
        near, far = self.lengths[0], self.lengths[-1]
        grown = [b - a for a, b in zip(self.gains(near, "reuse"), self.gains(far, "reuse"), strict=True)]
        words = f"gain in time to the first token, chunk of {far} − chunk of {near}"
        self.claim(OURS, words, grown, "the first token comes sooner (up to 7.8 times), the longer the text the more")

    def plot(self, figure: Any) -> None:
        """Divergence by way of estimating; gain in time by length of the chunk."""
        left, right = figure.subplots(1, 2) if self.lengths else (figure.subplots(), None)
        ways = [way for way in WAYS if self.values(way, 0)]
        means, errors = zip(*(mean_and_error(self.values(way, 0)) for way in ways), strict=True)
        left.barh(ways, means, xerr=errors, color=["C0" if way == OURS else "C7" for way in ways])
        left.set(xscale="log", xlabel="divergence from dense prefill, nats")
        left.invert_yaxis()
        figure.suptitle(self.title, fontsize=10)
        left.grid(alpha=0.25)
        if right is None:
            return
        for how, label in _TIMED.items():
            gains = [mean_and_error(self.gains(length, how)) for length in self.lengths]
            means, errors = zip(*gains, strict=True)
            right.errorbar(self.lengths, means, yerr=errors, marker="o", ms=3, label=label)
        right.axhline(1, color="k", lw=0.8)
        right.set(xscale="log", xlabel="bytes of the shared chunk", ylabel="dense time to first token over reused")
        right.set_xticks(self.lengths, [str(length) for length in self.lengths])
        right.minorticks_off()
        right.legend(fontsize=8)
        right.grid(alpha=0.25)


def _rank_correlation(some: Sequence[float], others: Sequence[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (some, others)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
