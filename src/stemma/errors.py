"""The error classes of Stemma. Each message says what was wrong, what was expected and what to do next."""

__all__ = [
    "InvalidBatchError",
    "InvalidDataError",
    "MissingExtraError",
    "NonFiniteError",
    "OutputError",
    "ServerError",
    "StateChangedError",
    "StemmaError",
    "UnsupportedModelError",
]


class StemmaError(Exception):
    """Base of every error that Stemma raises on purpose."""


class UnsupportedModelError(StemmaError, ValueError):
    """The model, or a setting of it, cannot be computed exactly over a shared prefix."""


class NonFiniteError(StemmaError, FloatingPointError):
    """A model's logits or gradients are NaN or infinite."""


class InvalidBatchError(StemmaError, ValueError):
    """Sequences, masks, token ids or lengths that do not make a batch."""


class InvalidDataError(StemmaError, ValueError):
    """A dataset line, record or reward that cannot be used."""


class OutputError(StemmaError, OSError):
    """An output cannot be written, or another process is writing it."""


class StateChangedError(StemmaError, RuntimeError):
    """A model changed between a forward and the backward that computes it again."""


class ServerError(StemmaError, RuntimeError):
    """A generation server cannot be reached, refuses a request, or answers with something else than was asked for."""


class MissingExtraError(StemmaError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'stemma-lm[{extra}]'")
