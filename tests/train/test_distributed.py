"""What a configuration of accelerate asks for and the trainers cannot do is refused by name; shipped ones are read."""

import types
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from stemma.errors import StemmaError
from stemma.train.distributed import check_accelerator

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"


def accelerator(kind: DistributedType, mixed_precision: str = "no") -> types.SimpleNamespace:
    return types.SimpleNamespace(distributed_type=kind, mixed_precision=mixed_precision)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_models_spread_otherwise_are_refused(kind: DistributedType) -> None:
    with pytest.raises(StemmaError, match=f"distributed_type {kind.value} spreads the model.*MULTI_GPU.*fsdp2.yaml"):
        check_accelerator(accelerator(kind), bf16=False)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_whole_models_are_not(kind: DistributedType) -> None:
    check_accelerator(accelerator(kind), bf16=False)
    check_accelerator(accelerator(kind, "bf16"), bf16=True)


@pytest.mark.parametrize(("precision", "bf16"), [("bf16", False), ("fp16", False), ("fp16", True), ("fp8", True)])
def test_mixed_precision_without_effect_is_refused(precision: str, bf16: bool) -> None:
    with pytest.raises(StemmaError, match=f"mixed_precision {precision} .* --bf16"):
        check_accelerator(accelerator(DistributedType.NO, precision), bf16=bf16)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_read_and_accepted(path: Path) -> None:
    config = load_config_from_file(str(path))
    launched = accelerator(DistributedType(config.distributed_type), config.mixed_precision)
    settings = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    plugin = types.SimpleNamespace(fsdp_version=settings.get("version"), cpu_offload=None, **settings)
    launched.state = types.SimpleNamespace(fsdp_plugin=plugin)
    check_accelerator(launched, bf16=False)
    assert config.num_processes > 1
