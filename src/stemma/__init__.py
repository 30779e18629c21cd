"""Stemma: the shared prefix of language-model sequences as a first-class object, encoded once, exactly."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemma.decode.generate import generate
    from stemma.decode.shared_prefix import SharedPrefix
    from stemma.errors import InvalidBatchError, InvalidDataError, MissingExtraError, StemmaError, UnsupportedModelError
    from stemma.prefix.tree import PrefixTree
    from stemma.scoring.check import CheckReport, check
    from stemma.scoring.enable import disable, enable
    from stemma.scoring.plan import Plan, explain
    from stemma.scoring.score import backward, score
    from stemma.scoring.scores import Scores

try:
    __version__ = version("stemma-lm")
except PackageNotFoundError:  # a source tree on the path without an installation
    __version__ = "0.0.0"

# Name -> module. Resolved on first use, so that `import stemma` costs milliseconds and imports no torch.
_PUBLIC = {
    "CheckReport": "stemma.scoring.check",
    "InvalidBatchError": "stemma.errors",
    "InvalidDataError": "stemma.errors",
    "MissingExtraError": "stemma.errors",
    "Plan": "stemma.scoring.plan",
    "PrefixTree": "stemma.prefix.tree",
    "Scores": "stemma.scoring.scores",
    "SharedPrefix": "stemma.decode.shared_prefix",
    "StemmaError": "stemma.errors",
    "UnsupportedModelError": "stemma.errors",
    "backward": "stemma.scoring.score",
    "check": "stemma.scoring.check",
    "disable": "stemma.scoring.enable",
    "enable": "stemma.scoring.enable",
    "explain": "stemma.scoring.plan",
    "generate": "stemma.decode.generate",
    "score": "stemma.scoring.score",
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
