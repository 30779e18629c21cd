"""GRPO whose samples come from a generation server: the run is that of a generator on this machine."""

import copy
from dataclasses import replace

import pytest
import torch

from generation_server import GenerationServer
from stemma.data import diallock
from stemma.decode import server as server_module
from stemma.decode.rollout import generate_groups
from stemma.decode.server import ServerGenerator

PER_ROW = ("completions", "logprobs", "finished", "forced_lengths")


def local_rows(model, prompts, /, *, num_generations, max_new_tokens, seed, forced=None):
    """Samples on this machine with the random numbers that the server of the test draws from each row's seed."""
    groups = []
    for prompt, seeds in zip(prompts, server_module._row_seeds(seed, len(prompts), num_generations)):
        rows = [
            generate_groups(
                model,
                [prompt],
                num_generations=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=diallock.EOS_ID,
                seed=one,
            )
            for one in seeds
        ]
        joined = {name: [[value for row in rows for value in getattr(row, name)[0]]] for name in PER_ROW}
        groups.append(replace(rows[0], **joined))
    return replace(groups[0], **{name: [getattr(group, name)[0] for group in groups] for name in ("prompts", *PER_ROW)})


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_training_through_a_server_equals_training_without_it(make_model, make_trainer, dialect, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    options = {"max_steps": 3, "learning_rate": 1e-2}
    model = make_model()
    expected = make_trainer(copy.deepcopy(model), generator=local_rows, **options)
    with GenerationServer(copy.deepcopy(model)) as server:
        generator = ServerGenerator(
            server.url, weights="sync", weights_dir=tmp_path, dialect=dialect, eos_token_id=diallock.EOS_ID
        )
        trained = make_trainer(model, generator=generator, **options)
        for _ in range(3):
            metrics, wanted = trained.step(), expected.step()
            for name in ("reward", "grad_norm", "tokens/sampled", "completions/mean_length"):
                assert metrics[name] == pytest.approx(wanted[name], rel=1e-5)
        updates = server.bodies("/collective_rpc") + server.bodies("/update_weights_from_disk")
        assert len(updates) == 3
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=0, atol=1e-8)
