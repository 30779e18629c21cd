"""Enabling and disabling leave no trace: parts of a model, interruptions, threads, autocast."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep

import pytest
import torch
import transformers

import stemma
from stemma.models.adapter import is_enabled
from stemma.models.tiny import tiny_model
from stemma.scoring.enable import while_enabled
from stemma.scoring.self_test import SelfTest

transformers.logging.set_verbosity_error()


def llama(**options):
    return tiny_model("llama", vocab_size=258, **options)


def gemma():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=sizes | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
    )
    return transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    ).eval()


def implementations(model):
    parts = (model.config, model.config.text_config, model.config.vision_config)
    return [part._attn_implementation for part in parts]


def test_every_part_of_a_model_gets_its_own_attention_back():
    model = gemma()
    before = implementations(model)
    assert before == ["sdpa", "eager", "sdpa"]
    stemma.enable(model)
    assert implementations(model) == ["stemma_sdpa", "stemma_eager", "stemma_sdpa"]
    stemma.disable(model)
    assert implementations(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_self_test_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch, error):
    def interrupted(self):
        raise error

    monkeypatch.setattr(SelfTest, "run", interrupted)
    model = llama()
    with pytest.raises(error):
        stemma.enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_threads_that_enable_one_model_do_so_one_after_the_other(monkeypatch):
    model, barrier, run, runs = llama(), Barrier(4), SelfTest.run, []

    def slow(self):
        runs.append(self)
        sleep(0.1)
        run(self)

    def work(number):
        barrier.wait()
        stemma.enable(model)

    monkeypatch.setattr(SelfTest, "run", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(runs) == 1
    stemma.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_blocks_that_overlap_disable_the_model_when_the_last_one_ends():
    model = llama()
    first, second = while_enabled(model), while_enabled(model)
    with first:
        with second:
            assert is_enabled(model)
        assert is_enabled(model)
    assert not is_enabled(model)
    first, second = while_enabled(model), while_enabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_enabled(model)
    second.__exit__(None, None, None)
    assert not is_enabled(model)
    with while_enabled(stemma.enable(model)):
        pass
    assert is_enabled(model)


def test_the_self_test_is_not_confused_by_autocast():
    tree = stemma.PrefixTree.from_groups([list(range(20))], [[[5, 6], [7]]])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model = stemma.enable(llama(seed=0))
        assert torch.is_autocast_enabled("cpu")
        stemma.score(model, tree, mode="shared")
