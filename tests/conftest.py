"""What every test relies on: no hub, no GPU by accident, one thread per worker, a repeatable start."""

import os
import signal

# Before transformers is imported: tests build their models and tokenizers in code and never ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import HealthCheck, settings

# A test run started in the background inherits an ignored Ctrl-C; tests of interruption, here and in their child
# processes, need the ordinary one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Timing limits mean nothing on a shared machine. The same examples every time, so that a failure is found again.
settings.register_profile(
    "stemma",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("stemma")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying what would make it run."""
    import importlib.util

    no_trl = importlib.util.find_spec("trl") is None
    for item in items:
        if no_trl and item.get_closest_marker("trl"):
            item.add_marker(pytest.mark.skip(reason="needs TRL: pip install 'stemma-lm[trl]'"))
        if item.get_closest_marker("real") and "STEMMA_REAL_MODEL" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs STEMMA_REAL_MODEL=FOLDER of a pretrained causal model"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def real_model() -> str:
    """The folder of the pretrained causal language model that tests marked `real` load."""
    return os.environ["STEMMA_REAL_MODEL"]


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """Every test starts from seed 0 and computes on one thread, whatever ran before it in the same worker."""
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
