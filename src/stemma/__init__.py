"""Stemma: the shared prefix of language-model sequences as a first-class object, encoded once, exactly."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemma.errors import InvalidBatchError, InvalidDataError, MissingExtraError, StemmaError, UnsupportedModelError
    from stemma.models.adapter import disable, enable
    from stemma.models.planner import Plan, explain
    from stemma.models.scoring import Scores, score
    from stemma.models.shared_prefix import SharedPrefix
    from stemma.models.streaming import backward
    from stemma.models.verify import CheckReport, check
    from stemma.prefix.tree import PrefixTree
    from stemma.serve.hydragen import generate

try:
    __version__ = version("stemma-lm")
except PackageNotFoundError:  # a source tree on the path without an installation
    __version__ = "0.0.0"

# Name -> module. Resolved on first use, so that `import stemma` costs milliseconds and imports no torch.
_PUBLIC = {
    "CheckReport": "stemma.models.verify",
    "InvalidBatchError": "stemma.errors",
    "InvalidDataError": "stemma.errors",
    "MissingExtraError": "stemma.errors",
    "Plan": "stemma.models.planner",
    "PrefixTree": "stemma.prefix.tree",
    "Scores": "stemma.models.scoring",
    "SharedPrefix": "stemma.models.shared_prefix",
    "StemmaError": "stemma.errors",
    "UnsupportedModelError": "stemma.errors",
    "backward": "stemma.models.streaming",
    "check": "stemma.models.verify",
    "disable": "stemma.models.adapter",
    "enable": "stemma.models.adapter",
    "explain": "stemma.models.planner",
    "generate": "stemma.serve.hydragen",
    "score": "stemma.models.scoring",
}

__all__ = [
    "CheckReport",
    "InvalidBatchError",
    "InvalidDataError",
    "MissingExtraError",
    "Plan",
    "PrefixTree",
    "Scores",
    "SharedPrefix",
    "StemmaError",
    "UnsupportedModelError",
    "__version__",
    "backward",
    "check",
    "disable",
    "enable",
    "explain",
    "generate",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stemma' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
