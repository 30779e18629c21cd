"""One seed decides everything; the state of all generators survives a file."""

import random

import numpy as np
import torch

from stemma.train.seeds import rng_state, seed_everything, set_rng_state, stream, stream_seed


def draw() -> tuple:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), random.gauss(0, 1)  # noqa: NPY002


def test_a_seed_repeats_every_global_generator() -> None:
    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first))


def test_state_survives_a_file_that_holds_plain_data(tmp_path) -> None:
    seed_everything(3)
    draw()  # numpy and random now hold a cached second normal number
    torch.save(rng_state(), tmp_path / "state.pt")
    expected = [draw(), draw()]
    seed_everything(0)
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), draw()] == expected


def test_streams_are_independent_of_each_other_and_of_the_global_state() -> None:
    state = torch.get_rng_state()
    first = torch.rand(4, generator=stream(1, "rollout", 5))
    assert torch.equal(torch.rand(4, generator=stream(1, "rollout", 5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    seeds = {stream_seed(s, *names) for s in range(5) for names in (("a", 1), ("a", 2), ("b", 1), ("a", "1", 1), ())}
    assert len(seeds) == 25
    assert all(0 <= seed < 2**63 for seed in seeds)
