"""KVCOMM: prompts of several agents around the same texts, without encoding the texts again for each.

Use it where agents that share one model pass texts to each other, or ask different things about the same documents.
Each agent's template puts other words before a text, so its keys and values cannot be reused as they are, and a prefix
cache finds nothing. Reuse here is an approximation, and the result says where it was made.

Source: "KVCOMM: Online Cross-context KV-cache Communication for Efficient LLM-based Multi-agent Systems", 2025, arXiv
2510.12872 (NeurIPS 2025). A text's keys and values are computed once, alone (its *base*); below a template they are
estimated as the base, turned to the new position, plus differences that were measured on earlier texts (*anchors*). The
equations are in `stemma.cache.offsets`, the pool in `stemma.cache.anchors`. A text becomes an anchor, with one dense
prefill for each agent, when no anchor stands out by likeness (an entropy above `gamma` of its largest value); otherwise
it is reused.

What we changed and why:

- Keys are estimated at the positions of the base and turned to their own last, so that an anchor is worth the same
  wherever it stood; the published code adds differences between keys at two different positions.
- Every rotary scheme of transformers, found by a probe (`stemma.models.rotary`); the published code knows one and
  applies YaRN's factor twice.
- The entropy rule compares distances relative to the text's own norm, times `sharpness`. The published distances are
  norms over all layers, tokens and channels: for one likeness their softmax is nearly flat for a short text in a small
  model and 0 and 1 for a long one in a large model, where the rule says "reuse" whenever there are two anchors.
  `sharpness=None` is that rule. Measured on a small model, the entropy does not predict how good an estimate is, but
  the number of anchors does; so a text also becomes an anchor while there are fewer than `min_anchors`.
- A text that is an anchor itself takes that anchor alone. Anchors credited with a use are those up to `top_p`, never
  all of them; a pool holds no more than its limit, in number and in bytes.
- Parts whose tokens, joined, are not the tokens of the text are refused. What was done, and why, is in the result.
- A share of the tokens is computed anew, those whose estimated keys are furthest off, as CacheBlend (arXiv 2405.16444)
  does: on a pretrained model nearer to a dense prefill than estimates alone, the paper's (`Config(recompute=0)`);
  `max_error` falls back to a dense prefill by the same measure.

One prompt at a time. Relations: exact reuse of common beginnings is `stemma.decode.generate`.

```python
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.serve.kvcomm import Config, KVComm

model, tokenizer = tiny_model("llama"), byte_tokenizer()
comm = KVComm(model, tokenizer, config=Config(min_anchors=1))
reader = comm.agent("reader", "Read this.\\n{document}\\nSummary:")
for text in ("The library opens at nine.", "The museum closes at six."):  # the first is encoded, and learned from
    prefill = reader.prefill({"document": comm.content(text)})
    answer = model.generate(**prefill.inputs, past_key_values=prefill.cache, max_new_tokens=4, do_sample=False)
    print(prefill.mode)
# prints: dense
# prints: blend
```
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stemma.cache.anchors import Deviation, Match
from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers, Weighting, add_to_content, add_to_following, closeness, differences, spread
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.limits import check_lengths
from stemma.models.rotary import cached_states, encode, plain_cache
from stemma.models.tokens import text_ids
from stemma.serve.kvcomm.recompute import key_errors, recompute, second_layer
from stemma.serve.kvcomm.template import Part, Template, check_joins
from stemma.serve.kvcomm.texts import Config, Content, Prefill, Texts, Usage, copied, cut

__all__ = ["Agent", "Config", "Content", "KVComm", "Plan", "Prefill", "Template", "Usage"]

Mode = Literal["auto", "dense", "learn", "reuse", "blend"]
_PROBES = 16
"""Tokens on which `max_error` is looked at."""


class Plan(NamedTuple):
    """What is to be done for one placeholder."""

    matches: tuple[Match, ...]
    """The anchors to estimate from."""
    reason: str = ""
    """Why a dense prefill should make the text an anchor; empty when it need not."""
    closeness: Tensor | None = None
    """`(A,)` how near each of them is; None where the rule did not get so far."""


class KVComm(Texts):
    """One model, the texts and anchors of its agents; arguments and refusals as `Texts`."""

    def agent(self, name: str, template: str | Template | Sequence[Mapping[str, str]]) -> "Agent":
        """An agent with a template of its own: a text with placeholders, or chat messages with placeholders.

        Raises:
            InvalidBatchError: no placeholder, or the pool knows the name with another template.
        """
        if isinstance(template, str):
            template = Template.parse(template)
        elif not isinstance(template, Template):
            template = Template.of_messages(self.tokenizer, template)
        return Agent(self, name, template)


class Agent:
    """A template and what is known about it; made by `KVComm.agent`."""

    def __init__(self, comm: Texts, name: str, template: Template) -> None:
        self.comm, self.name, self.template = comm, name, template
        self._digest = template.digest(comm.tokenizer)
        self.pieces = template.piece_ids(comm.tokenizer)
        self._ids, self._starts = list(self.pieces[0]), [0]
        for placeholder, piece in zip(template.names, self.pieces[1:], strict=True):
            self._ids += text_ids(comm.tokenizer, placeholder, special_tokens=False)
            self._starts.append(len(self._ids))
            self._ids += piece
        self._bases: list[Layers] = []
        self._owner: tuple[object, ...] = ()
        comm.check()
        self._refresh()

    def _refresh(self) -> None:
        """Make the bases of the template's pieces where the model has changed, and be known to the pool."""
        comm = self.comm
        comm.pool.register(self.name, self._digest)
        if self._owner == comm.owner:
            return
        cache = encode(comm.model, self._ids)
        self._bases = [
            copied(cached_states(cache, start, start + len(piece)))
            for start, piece in zip(self._starts, self.pieces, strict=True)
        ]
        self._owner = comm.owner

    @torch.no_grad()
    def prefill(self, contents: Mapping[str, str | Content], *, mode: Mode = "auto") -> Prefill:
        """Keys and values of the template filled in.

        Args:
            contents: a text for each placeholder: plain, or from `KVComm.content` or `answer`, so that
                others that use it do not encode it again.
            mode: "auto" reuses what the sharing rule allows and computes `Config.recompute` of it anew, but for prompts
                longer than a sliding window; otherwise it encodes the whole prompt, learning from it. "dense" encodes
                it and learns nothing; "learn" encodes it and makes its texts anchors; "reuse" refuses where there is
                no anchor to estimate from; "blend" estimates what it can and computes a share of the tokens anew.

        Raises:
            InvalidBatchError: a text too many or missing; tokens that do not join; more tokens than the model has
                positions; with "reuse", a text without anchors or an error above `max_error`; but with "dense", an
                answer of another model or header, or of this model before it changed.
            UnsupportedModelError: a layer attends in chunks, and the prompt is longer than one; with "blend" or
                `max_error`, a sliding window shorter than the prompt.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        self.comm.check()
        given = self._given(contents)
        ids, spans = self._join(given)
        self._refresh()
        if mode == "dense":
            return self._dense(ids, spans, given, (), 0, "asked for")
        empty = [name for name, content in given.items() if not content.ids]
        if empty:
            if mode == "reuse":
                raise InvalidBatchError(f"the text of {{{empty[0]}}} is empty, so there is nothing to estimate from.")
            return self._dense(ids, spans, given, (), 0, f"the text of {{{empty[0]}}} is empty")
        encoded, plans = 0, {}
        for content in given.values():
            self.comm.check_base(content)
        for name, content in given.items():
            encoded += self.comm.base(content)[1]
            plans[name] = self.plan(name, content)
        if mode == "learn":
            return self._dense(ids, spans, given, self.template.names, encoded, "asked for")
        if mode == "reuse":
            missing = [name for name, plan in plans.items() if not plan.matches]
            if missing:
                raise InvalidBatchError(
                    f"no anchor of {{{missing[0]}}} fits agent {self.name!r} ({plans[missing[0]].reason}), and "
                    'mode="reuse" does not compute; fill the pool with mode="learn" or "auto".'
                )
        refused = [(name, plan) for name, plan in plans.items() if plan.reason]
        if mode == "auto" and refused:
            reason = "; ".join(f"{{{name}}}: {plan.reason}" for name, plan in refused)
            return self._dense(ids, spans, given, [name for name, _ in refused], encoded, reason)
        return self._estimated(ids, spans, given, plans, encoded, mode)

    # ------------------------------------------------------------------ what is given

    def _given(self, contents: Mapping[str, str | Content]) -> dict[str, Content]:
        names = set(self.template.names)
        wrong = sorted(names ^ set(contents))
        if wrong:
            raise InvalidBatchError(
                f"agent {self.name!r} needs texts for {sorted(names)}, got {sorted(contents)}; "
                f"{wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}."
            )
        return {
            name: contents[name] if isinstance(contents[name], Content) else self.comm.content(contents[name])  # type: ignore[misc,arg-type]
            for name in self.template.names
        }

    def _join(self, given: Mapping[str, Content]) -> tuple[list[int], dict[str, tuple[int, int]]]:
        """The prompt's ids, and where each text stands."""
        parts = [Part(self.pieces[0], self.template.pieces[0], "the template's beginning")]
        ids, spans = list(self.pieces[0]), {}
        for number, (name, content) in enumerate(given.items(), start=1):
            spans[name] = (len(ids), len(ids) + len(content.ids))
            ids += [*content.ids, *self.pieces[number]]
            parts.append(Part(content.ids, content.text, f"the text of {{{name}}}"))
            parts.append(Part(self.pieces[number], self.template.pieces[number], f"what follows {{{name}}}"))
        check_joins(self.comm.tokenizer, parts, self.template.special_tokens)
        check_lengths(self.comm.model, len(ids) + 1)
        if self.comm.chunk is not None and len(ids) > self.comm.chunk:
            raise UnsupportedModelError(
                f"the prompt has {len(ids)} tokens, and a layer attends in chunks of {self.comm.chunk} counted from "
                "the beginning of the prompt, so a text does not keep its neighbours where it is moved."
            )
        return ids, spans

    # ------------------------------------------------------------------ what is to be done

    def plan(self, name: str, content: Content) -> Plan:
        """What the sharing rule says about a text, not empty, in a placeholder."""
        pool, config = self.comm.pool, self.comm.config
        same = pool.find(name, content.ids, content.origin)
        if same is not None:
            matches = pool.matches([same], self.name)
            return Plan(matches, "" if matches else "an anchor new to this agent", torch.ones(len(matches)))
        eligible = pool.eligible(name, len(content.ids), content.origin)
        matches = pool.matches(eligible, self.name)
        if not eligible:
            return Plan((), f"no anchor of {len(content.ids)} or more tokens")
        if len(matches) < config.min_anchors:
            return Plan(matches, f"{len(matches)} of {config.min_anchors} anchors that this agent needs")
        near = closeness(self.comm.base(content)[0], [match.anchor.base for match in matches], config.sharpness)
        reason = f"no anchor stands out ({spread(near):.2f} > {config.gamma})" if spread(near) > config.gamma else ""
        return Plan(matches, reason, near)

    # ------------------------------------------------------------------ dense

    def _dense(
        self,
        ids: list[int],
        spans: dict[str, tuple[int, int]],
        given: Mapping[str, Content],
        learn: Sequence[str],
        encoded: int,
        reason: str,
    ) -> Prefill:
        exact = len(self.pieces[0])
        rest = ids[exact:] if learn else ids[exact:-1]
        cache = encode(self.comm.model, rest, above=self._bases[0]) if rest else plain_cache(self._bases[0])
        learned = [name for name in learn if self._learn(name, given[name], spans[name], cached_states(cache))]
        return Prefill(
            ids=ids,
            cache=plain_cache(cached_states(cache, 0, len(ids) - 1)),
            mode="dense",
            reason=reason,
            usage=Usage(prompt=len(ids), exact=exact, reused=0, computed=len(rest), encoded=encoded, looked_at=0),
            learned=tuple(learned),
            error=None,
            spans=spans,
            owner=self._owner,
        )

    def _learn(self, name: str, content: Content, span: tuple[int, int], real: Layers) -> bool:
        comm, (begin, end) = self.comm, span
        base = comm.base(content)[0]
        number = self.template.names.index(name) + 1
        stop = end + len(self.pieces[number])
        there = comm.rotations.move(cut(real, begin, end), len(comm.header) - begin)
        behind = comm.rotations.move(cut(real, end, stop), self._starts[number] - end)
        deviation = Deviation(differences(there, base), differences(behind, self._bases[number]))
        return comm.pool.learn(name, content.ids, content.origin, base, self.name, deviation)

    # ------------------------------------------------------------------ estimated

    def assemble(
        self,
        given: Mapping[str, Content],
        matches: Mapping[str, Sequence[Match]],
        *,
        weighting: Weighting | None = None,
        move: bool = True,
    ) -> Layers:
        """Estimated keys and values of the whole prompt.

        Args:
            given: the texts, with their bases made or to be made.
            matches: the anchors to estimate each from; where there are none, bases are only moved.
            weighting: in place of the config's.
            move: turn keys to their places; otherwise they are left as they were encoded (for comparison).
        """
        comm, config = self.comm, self.comm.config
        comm.check()
        self._refresh()
        weights: dict[str, Any] = {"temperature": config.temperature, "weighting": weighting or config.weighting}
        runs, place = [self._bases[0]], len(self.pieces[0])
        for number, name in enumerate(self.template.names, start=1):
            content, piece = given[name], self._bases[number]
            text = comm.base(content)[0]
            known, behind = list(matches.get(name, ())), piece
            near = [match.anchor.base for match in known]
            there = text if not known else add_to_content(text, near, [m.deviation.content for m in known], **weights)
            following = [m.deviation.following for m in known if m.deviation.following is not None]
            if following and len(following) == len(known) and self.pieces[number]:
                behind = add_to_following(piece, text, near, following, **weights)
            end = place + len(content.ids)
            if move:
                there = comm.rotations.move(there, place - len(comm.header))
                behind = comm.rotations.move(behind, end - self._starts[number])
            runs += [there, behind]
            place = end + len(self.pieces[number])
        return tuple(
            KeyValues(*(torch.cat(tensors, dim=2) for tensors in zip(*pairs, strict=True)))
            for pairs in zip(*runs, strict=True)
        )

    def _estimated(
        self,
        ids: list[int],
        spans: dict[str, tuple[int, int]],
        given: Mapping[str, Content],
        plans: Mapping[str, Plan],
        encoded: int,
        mode: Mode,
    ) -> Prefill:
        model, config = self.comm.model, self.comm.config
        exact, last = len(self.pieces[0]), len(ids) - 1
        for plan in plans.values():
            if plan.matches and plan.closeness is not None:
                self.comm.pool.credit([match.anchor for match in plan.matches], plan.closeness, config.top_p)
        states = cut(self.assemble(given, {name: plan.matches for name, plan in plans.items()}), 0, last)
        looked_at, error, computed = 0, None, 0
        within = self.comm.window is None or len(ids) <= self.comm.window
        blend = mode == "blend" or (mode == "auto" and config.recompute > 0 and within)
        if (blend or config.max_error is not None) and last > exact and len(states) > 1:
            self._refuse_window(len(ids))
            positions = torch.arange(exact, last)
            if not blend:
                positions = torch.linspace(exact, last - 1, min(_PROBES, last - exact)).long().unique()
            errors = key_errors(second_layer(model, ids, positions, states), states[1], positions)
            looked_at, error = positions.numel(), float(errors.mean())
            if mode != "blend" and config.max_error is not None and error > config.max_error:
                words = f"estimated keys are off by {error:.2f} > {config.max_error}"
                if mode == "reuse":
                    raise InvalidBatchError(f'{words}, and mode="reuse" does not compute; raise max_error.')
                return self._dense(ids, spans, given, self.template.names, encoded, words)
            computed = round(config.recompute * positions.numel()) if blend else 0
            if computed:
                worst = errors.topk(computed).indices.sort().values.cpu()
                states = recompute(model, ids, positions[worst], states)
        without = [name for name, plan in plans.items() if not plan.matches]
        reason = f"no anchors of {{{without[0]}}}" if without else "anchors of every text"
        return Prefill(
            ids=ids,
            cache=plain_cache(states),
            mode="blend" if mode == "blend" or computed else "reuse",
            reason=reason,
            usage=Usage(
                prompt=len(ids),
                exact=exact,
                reused=last - exact - computed,
                computed=computed,
                encoded=encoded,
                looked_at=looked_at,
            ),
            learned=(),
            error=error,
            spans=spans,
            owner=self._owner,
        )

    def _refuse_window(self, tokens: int) -> None:
        if self.comm.window is not None and tokens > self.comm.window:
            raise UnsupportedModelError(
                f"the prompt has {tokens} tokens and a layer has a sliding window of {self.comm.window}; tokens are "
                "looked at and recomputed under one mask for all layers. Leave out max_error and blend."
            )

    # ------------------------------------------------------------------ handing over

    @torch.no_grad()
    def answer(self, prefill: Prefill, sequence: Tensor | Sequence[int]) -> Content:
        """What `generate` has added to a prompt, as a text for other agents: its tokens are not tokenized again, and
        the keys and values it was generated with are its base.

        Args:
            prefill: of this agent; its cache is the one that `generate` was given.
            sequence: the whole row, prompt included; the end-of-sequence token that ended it is left out.

        Raises:
            InvalidBatchError: several rows; the row does not begin with the prompt, adds nothing, or the cache does not
                hold it; another model, or this one has changed since.
        """
        row, held = self.comm.generated(prefill, sequence)
        start, length = len(prefill.ids), held[0].key.shape[2]
        if length < len(row):  # the last token was sampled and not yet run
            held = cached_states(encode(self.comm.model, row[length:], above=held))
        base = copied(self.comm.rotations.move(cut(held, start, len(row)), len(self.comm.header) - start))
        return Content(tuple(row[start:]), None, "generated", base, self.comm.owner)
