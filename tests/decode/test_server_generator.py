import copy
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from generation_server import GenerationServer
from stemma.decode import json_client
from stemma.decode.rollout import LocalGenerator
from stemma.decode.server import ServerGenerator
from stemma.errors import InvalidBatchError, ServerError, UnsupportedModelError
from stemma.models.tiny import byte_tokenizer, tiny_model

VOCAB = 128
EOS = [2, 7, 9, 33, 61, 90]
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4], [6, 6, 11]]
DIALECTS = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
CALL = {"num_generations": 4, "max_new_tokens": 12, "seed": 5}


@pytest.fixture(autouse=True)
def direct_connection(monkeypatch):
    monkeypatch.setattr(json_client, "_RETRY_SECONDS", 0.001)


@pytest.fixture
def model():
    return tiny_model(
        "llama", vocab_size=VOCAB, hidden_size=32, max_position_embeddings=64, initializer_range=0.25, seed=3
    )


@pytest.fixture
def server(model):
    with GenerationServer(copy.deepcopy(model), byte_tokenizer()) as running:
        yield running


def fixed(server, **options):
    return ServerGenerator(server.url, **{"weights": "fixed", "eos_token_id": EOS, **options})


def flat(groups):
    return [row for group in groups for row in group]


@DIALECTS
def test_greedy_tokens_and_logprobs_are_those_of_the_local_generator(server, model, dialect):
    forced = [[[], [1, 4], [2], [1] * 12]] * 3
    for beginnings in (None, forced):
        remote = fixed(server, dialect=dialect, temperature=0.0)(model, PROMPTS, forced=beginnings, **CALL)
        local = LocalGenerator(eos_token_id=EOS, temperature=0.0)(model, PROMPTS, forced=beginnings, **CALL)
        assert remote.completions == local.completions
        assert remote.finished == local.finished
        assert remote.forced_lengths == local.forced_lengths
        assert remote.prompts == PROMPTS
        for values, wanted, length in zip(flat(remote.logprobs), flat(local.logprobs), flat(local.forced_lengths)):
            assert values[:length].isnan().all()
            torch.testing.assert_close(values[length:], wanted[length:], rtol=0, atol=1e-5)
    assert len({tuple(ids) for ids in flat(remote.completions)}) > 1
    assert len(server.requests) == 12 + 6  # rows that a forced beginning completes ask for nothing


@DIALECTS
def test_samples_depend_on_the_seed_and_not_on_concurrency(server, model, dialect):
    def run(seed, **options):
        return fixed(server, dialect=dialect, top_k=9, **options)(model, PROMPTS, **{**CALL, "seed": seed}).completions

    first = run(1)
    assert first == run(1, max_concurrency=1)
    assert first != run(2)
    assert len({tuple(ids) for ids in first[0]}) > 1
    seeds = run([4, 5, 6])
    alone = fixed(server, dialect=dialect, top_k=9)(model, [PROMPTS[1]], **{**CALL, "seed": [5]})
    assert seeds[1] == alone.completions[0]
    with pytest.raises(ValueError, match="3 prompts, got 2"):
        run([4, 5])


@DIALECTS
def test_every_sampling_option_reaches_the_server(server, model, dialect):
    options = {"temperature": 0.5, "top_p": 0.7, "top_k": 5}
    fixed(server, dialect=dialect, processed_logprobs=dialect == "vllm", stop_strings="~", **options)(
        model, PROMPTS, **CALL
    )
    (_, body, _) = server.requests[0]
    sent = body if dialect == "vllm" else body["sampling_params"]
    assert {name: sent[name] for name in options} == options
    assert sent["stop"] == ["~"]
    assert sent["stop_token_ids"] == EOS
    assert sent["repetition_penalty"] == 1.0  # servers take defaults from the model's generation config
    assert ("model" in body) is False
    fixed(server, model="policy", api_key="k")(model, [[1]], **CALL)
    path, body, headers = server.requests[-1]
    assert (path, body["model"], headers["Authorization"]) == ("/v1/completions", "policy", "Bearer k")


@DIALECTS
def test_stop_strings_end_rows(server, model, dialect):
    local = LocalGenerator(eos_token_id=None, temperature=0.0)(model, PROMPTS, **CALL)
    stop = byte_tokenizer().decode(local.completions[0][0][4:6])
    remote = fixed(server, dialect=dialect, temperature=0.0, eos_token_id=None, stop_strings=[stop])
    rollouts = remote(model, PROMPTS, **CALL)
    assert rollouts.completions[0][0] == local.completions[0][0][:6]
    assert rollouts.finished[0][0]


def test_requests_run_together_up_to_the_limit(server, model):
    barrier = threading.Barrier(3)  # passes only when three requests are under way
    server.gate = lambda: barrier.wait(timeout=20)
    fixed(server, max_concurrency=3)(model, PROMPTS, **CALL)
    assert server.most_at_once == 3


def test_lost_connections_are_tried_again_and_then_named(model):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    generator = ServerGenerator(url, weights="fixed", eos_token_id=None, retries=2)
    with pytest.raises(ServerError, match=r"no connection to .*/v1/completions in 3 attempts"):
        generator(model, PROMPTS, **CALL)


def test_a_connection_that_breaks_once_does_no_harm(server, model, monkeypatch):
    wanted = fixed(server, temperature=0.0)(model, PROMPTS, **CALL)
    connect, calls = json_client.http.client.HTTPConnection.connect, []

    def breaks_first(connection):
        calls.append(connection)
        if len(calls) <= 2:
            raise ConnectionResetError("broken")
        connect(connection)

    monkeypatch.setattr(json_client.http.client.HTTPConnection, "connect", breaks_first)
    again = fixed(server, temperature=0.0, max_concurrency=1)(model, PROMPTS, **CALL)
    assert again.completions == wanted.completions
    assert len(calls) == 12 + 2


def test_a_slow_server_is_named(server, model):
    server.gate = lambda: time.sleep(1)
    with pytest.raises(ServerError, match=r"did not answer within timeout=0.05 seconds"):
        fixed(server, timeout=0.05)(model, [[1]], **{**CALL, "num_generations": 1})


def without(*path):
    """Drop an entry of an answer."""

    def change(_, answer):
        inner = answer
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return answer

    return change


def row(ids, logprobs, reason):
    """vLLM's answer with another continuation."""

    def change(_, answer):
        answer["choices"][0] |= {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
        return answer

    return change


def put(value, *path):
    """Replace an entry of an answer."""

    def change(_, answer):
        inner = answer
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return answer

    return change


@pytest.mark.parametrize(
    ("dialect", "answer", "message"),
    [
        ("vllm", lambda *_: (400, "max_tokens is too large"), "HTTP 400 .*max_tokens is too large"),
        ("vllm", lambda *_: (200, "<html>"), "else than a JSON object: '<html>'"),
        ("vllm", lambda *_: (200, "[1]"), "else than a JSON object"),
        ("vllm", put([], "choices"), "0 choices, expected 1"),
        ("vllm", without("choices", 0, "token_ids"), "no token ids; use vLLM 0.11 or newer"),
        ("vllm", put([5, 5], "choices", 0, "prompt_token_ids"), "prompt of 2 token ids that is not the one of 7"),
        ("vllm", without("choices", 0, "logprobs"), "no log-probabilities"),
        ("vllm", put([-1.0], "choices", 0, "logprobs", "token_logprobs"), "1 log-probabilities for"),
        ("vllm", put([None] * 12, "choices", 0, "logprobs", "token_logprobs"), "0 log-probabilities for"),
        ("vllm", put([VOCAB], "choices", 0, "token_ids"), f"token id {VOCAB}, outside"),
        ("vllm", put([], "choices", 0, "token_ids"), "returned 0 token ids, expected 1 to 12"),
        ("vllm", put([1] * 13, "choices", 0, "token_ids"), "returned 13 token ids"),
        ("vllm", put("abort", "choices", 0, "finish_reason"), "'abort', expected 'stop' or 'length'"),
        ("vllm", put([4.0], "choices", 0, "token_ids"), r"token id 4\.0, outside"),
        ("vllm", put([True], "choices", 0, "token_ids"), "token id True, outside"),
        ("vllm", put([10**400], "choices", 0, "token_ids"), "outside"),
        ("vllm", put("4", "choices", 0, "token_ids"), "token id 4, outside"),
        ("vllm", put([EOS[1], 1], "choices", 0, "token_ids"), "went on behind an end-of-sequence token"),
        ("vllm", row([1], [0.5], "stop"), "log-probability of 0.5; none is above 0"),
        ("vllm", row([1], [True], "stop"), "0 log-probabilities for 1"),
        ("vllm", row([1], [-(10**400)], "stop"), "0 log-probabilities for 1"),
        ("vllm", row([1], [-1.0], "length"), "cut a row off after 1 of 12 tokens"),
        ("vllm", row([1], [-1.0], ["stop"]), r"ended a continuation with \['stop'\]"),
        ("vllm", put("x", "choices"), "did not answer as vllm does"),
        ("vllm", put([None], "choices"), "did not answer as vllm does"),
        ("vllm", put([1], "choices", 0, "logprobs"), "did not answer as vllm does"),
        ("vllm", put(7, "choices", 0, "prompt_token_ids"), "did not answer as vllm does"),
        ("vllm", lambda *_: (200, "[" * 100_000), "else than a JSON object"),
        ("vllm", lambda *_: (200, '{"choices": ' + "9" * 5000 + "}"), "else than a JSON object"),
        ("sglang", put([1], "meta_info"), "did not answer as sglang does"),
        ("sglang", put([[-1.0]], "meta_info", "output_token_logprobs"), "did not answer as sglang does"),
        ("sglang", put("stop", "meta_info", "finish_reason"), "did not answer as sglang does"),
        ("sglang", put([[-1.0, 4.0, None]], "meta_info", "output_token_logprobs"), "token id 4.0, outside"),
        ("sglang", without("meta_info", "output_token_logprobs"), "no meta_info.output_token_logprobs"),
        ("sglang", put(3, "meta_info", "prompt_tokens"), "prompt of 3 token ids, but was sent 7"),
        ("sglang", put({"type": "abort"}, "meta_info", "finish_reason"), "'abort'"),
        ("sglang", put([[None, 4, None]], "meta_info", "output_token_logprobs"), "0 log-probabilities for 1"),
        ("sglang", put([[math.nan, 4, None]], "meta_info", "output_token_logprobs"), "0 log-probabilities for 1"),
    ],
)
def test_answers_that_were_not_asked_for_are_refused(server, model, dialect, answer, message):
    server.answer = answer
    with pytest.raises(ServerError, match=message):
        fixed(server, dialect=dialect)(model, [PROMPTS[0]], **{**CALL, "num_generations": 1})


def test_prompts_are_checked_before_anything_is_sent(server, model):
    for prompts, forced in [([], None), ([[VOCAB]], None), ([[1] * 60], None), ([[1]], [[[VOCAB]] * 4])]:
        with pytest.raises(InvalidBatchError):
            fixed(server)(model, prompts, forced=forced, **CALL)
    assert not server.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url must begin"),
        ({"weights": "sync"}, "weights_dir"),
        ({"weights_dir": "x"}, "weights_dir"),
        ({"weights": "stale"}, "weights must be"),
        ({"dialect": "tgi"}, "dialect"),
        ({"temperature": 0.7}, "--logprobs-mode processed_logprobs"),
        ({"dialect": "sglang", "processed_logprobs": True}, "processed_logprobs"),
        ({"top_p": 0.0}, "top_p"),
        ({"timeout": 0}, "timeout"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"retries": -1}, "retries"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    defaults = {"url": "http://localhost:8000", "weights": "fixed", "eos_token_id": 1}
    with pytest.raises(ValueError, match=message):
        ServerGenerator(**{**defaults, **options})


@DIALECTS
def test_the_server_gets_the_weights_whenever_they_have_changed(server, model, dialect, tmp_path):
    path = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}[dialect]
    options = {"dialect": dialect, "weights": "sync", "weights_dir": tmp_path / "weights", "temperature": 0.0}
    generator = fixed(server, **options)
    local = LocalGenerator(eos_token_id=EOS, temperature=0.0)
    for step in range(3):
        with torch.no_grad():
            model.lm_head.weight[step + 11] += 1.0
        for _ in range(2):
            remote = generator(model, PROMPTS, **CALL)
            assert remote.completions == local(model, PROMPTS, **CALL).completions
        assert len(server.bodies(path)) == step + 1
        assert len(server.bodies("/reset_prefix_cache")) == (step + 1) * (dialect == "vllm")
        (folder,) = (tmp_path / "weights").iterdir()  # those before are gone
        assert (folder / "model.safetensors").exists()
    for name, value in model.state_dict().items():
        assert torch.equal(server.model.state_dict()[name], value)
    # Another generator cannot know what the server has.
    fixed(server, **options)(model, PROMPTS, **CALL)
    assert len(server.bodies(path)) == 4


def test_fixed_weights_stay_what_they_are(server, model):
    before = fixed(server, temperature=0.0)(model, PROMPTS, **CALL)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert fixed(server, temperature=0.0)(model, PROMPTS, **CALL).completions == before.completions


@pytest.mark.parametrize(
    ("dialect", "answer", "message"),
    [
        ("vllm", lambda *_: (404, "Not Found"), "HTTP 404 .*VLLM_SERVER_DEV_MODE=1"),
        ("vllm", lambda *_: (500, "unexpected keyword argument"), "unexpected keyword argument.*takes weights_path"),
        ("sglang", put(False, "success"), "did not load the weights"),
    ],
)
def test_weights_that_were_not_loaded_are_an_error_and_sent_again(server, model, dialect, answer, message, tmp_path):
    generator = fixed(server, dialect=dialect, weights="sync", weights_dir=tmp_path)
    server.answer = answer
    for _ in range(2):
        with pytest.raises(ServerError, match=message):
            generator(model, PROMPTS, **CALL)
    server.answer = lambda path, answer: answer
    generator(model, PROMPTS, **CALL)
    assert len(server.requests) >= 3 + 12


def test_adapters_are_not_sent(server, model, tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="PEFT"):
        fixed(server, weights="sync", weights_dir=tmp_path)(adapted, PROMPTS, **CALL)
    assert fixed(server)(adapted, PROMPTS, **CALL).sampled_tokens > 0


def test_process_0_alone_sends_the_weights(tmp_path):
    worker = Path(__file__).with_name("server_worker.py")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), tmp_path],
        env=os.environ | {"PYTHONPATH": str(worker.parents[1]), "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("told") == 2
