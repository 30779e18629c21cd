"""Some cases of the fuzz, drawn anew by hypothesis, and that it finds what is wrong."""

from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
from stemma.models import adapter


@settings(max_examples=12)
@given(st.integers(0, 2**31))
def test_a_drawn_case_is_as_close_to_float64_as_each_row_alone(seed):
    case = fuzz.Case.of(seed)
    if any(len(row) > 1 for row in case.rows):
        found = fuzz.errors(case)
        assert not fuzz.wrong(case, found), (case, found)


def test_a_forgotten_window_and_a_wrong_gradient_are_found(monkeypatch):
    cases = [fuzz.Case.of(seed) for seed in range(60)]
    streamed_or_shared = [case for case in cases if case.mode == "shared" and max(map(len, case.rows)) > 12]
    windowed = next(case for case in streamed_or_shared if "window" in case.kind)
    honest = adapter.tree_attention
    monkeypatch.setattr(fuzz.stemma, "enable", lambda model: honest_enable(model, self_test=False))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "tree_attention", lambda *rest, **kw: honest(*rest, **kw | {"window": None}))
        assert fuzz.wrong(windowed, fuzz.errors(windowed))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "tree_attention", lambda q, k, v, *rest, **kw: honest(q, k, v.detach(), *rest, **kw))
        assert fuzz.wrong(windowed, fuzz.errors(windowed))
    assert not fuzz.wrong(windowed, fuzz.errors(windowed))


honest_enable = fuzz.stemma.enable
