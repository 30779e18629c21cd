"""Checkpoints are whole or absent, load without us, and signals ask for one."""

import json
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stemma.data import diallock
from stemma.errors import InvalidDataError, OutputError
from stemma.models.tiny import tiny_model
from stemma.scoring.enable import enable
from stemma.train.checkpoint import StopSignal, latest, load_state, load_weights, save, save_model


def make_model(seed: int = 0):
    return tiny_model(
        "llama", vocab_size=diallock.VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, seed=seed
    )


def save_step(folder: Path, step: int, model=None, **options) -> Path:
    return save(
        folder,
        step,
        model=make_model() if model is None else model,
        processing_class=diallock.tokenizer(),
        state={"global_step": step, "tensor": torch.arange(3), "nested": [(1, 2.5, "x"), None]},
        progress={"step": step},
        **options,
    )


def test_a_checkpoint_loads_by_from_pretrained_and_gives_its_state_back(tmp_path: Path) -> None:
    model = enable(make_model(seed=3))
    path = save_step(tmp_path, 12, model)
    assert path.name == "checkpoint-000012"
    assert json.loads((path / "trainer_state.json").read_text()) == {"step": 12}
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    # The file says nothing about us: the attention is the one that the model came with.
    assert "stemma" not in (path / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(path).decode([2, 3, 12]) == diallock.tokenizer().decode([2, 3, 12])
    state = load_state(path)
    assert state["nested"] == [(1, 2.5, "x"), None]
    assert torch.equal(state["tensor"], torch.arange(3))


def test_weights_are_restored_bit_for_bit(tmp_path: Path) -> None:
    saved, other = make_model(seed=1), enable(make_model(seed=2))
    save_model(tmp_path / "model", model=saved, processing_class=diallock.tokenizer())
    load_weights(other, tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters()))


def test_adapter_weights_are_restored(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: pip install 'stemma-lm[peft]'")

    def adapted(scale: float):
        model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.fill_(scale)
        return model

    saved, other = adapted(0.5), adapted(0.0)
    path = save_step(tmp_path, 1, saved)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters()))
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, file)
    with pytest.raises(InvalidDataError, match=r"cannot read the weights in .*adapter is not whole.*another"):
        load_weights(other, path)
    file.unlink()
    with pytest.raises(InvalidDataError, match=r"there is no adapter_model\.safetensors"):
        load_weights(other, path)


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    (tmp_path / ".checkpoint-000099.tmp").mkdir()  # left by a run that was killed while it wrote
    (tmp_path / "checkpoint-best").mkdir()
    assert latest(tmp_path) is None
    for step in (5, 10, 100):
        save_step(tmp_path, step, save_total_limit=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000010", "checkpoint-000100", "checkpoint-best"]
    assert latest(tmp_path).name == "checkpoint-000100"


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 5)

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_step(tmp_path, 5, Broken())
    assert latest(tmp_path).name == "checkpoint-000005"
    assert load_state(latest(tmp_path))["global_step"] == 5


def test_an_unreadable_state_names_the_file(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / "training_state.pt").write_bytes(b"not a state")
    with pytest.raises(InvalidDataError, match=r"checkpoint-000001.training_state\.pt"):
        load_state(path)


def test_the_first_signal_asks_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 2\nframe"), SafetensorError("full")],
)
def test_whatever_cannot_be_written_is_one_error_and_leaves_what_was_there(tmp_path: Path, monkeypatch, error) -> None:
    save_step(tmp_path, 5)
    monkeypatch.setattr("torch.save", mock.Mock(side_effect=error))
    for step in (5, 6):
        with pytest.raises(OutputError, match=rf"cannot write .*checkpoint-00000{step}: .*is there room\?") as raised:
            save_step(tmp_path, step)
        assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000005"]
    assert load_state(latest(tmp_path))["global_step"] == 5


def test_pruning_that_is_killed_leaves_no_part_under_a_real_name(tmp_path: Path, monkeypatch) -> None:
    save_step(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, 6, save_total_limit=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000006"]
    save_step(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000006", "checkpoint-000007"]
