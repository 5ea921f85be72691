"""Errors of the base model.

AdaplexError            (adaplex.adapters.errors)
└── ModelError
    ├── ModelSourceError    the model cannot be found, fetched, checked or converted
    └── UnsupportedModel    the model was read, but its architecture cannot be served
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adaplex.adapters.errors import AdaplexError


class ModelError(AdaplexError):
    """Something is wrong with the base model; the server cannot start with it."""


class ModelSourceError(ModelError):
    """The model cannot be found, fetched, checked or converted."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r}: {reason}")
        self.model = model
        self.reason = reason


class UnsupportedModel(ModelError):
    """The model's architecture, or a shape of it, cannot be served."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def errors_as_unsupported(what: str) -> Iterator[None]:
    """Raises UnsupportedModel, in one line, for any error of a library that reads a model."""
    try:
        yield
    except Exception as error:  # transformers raises all kinds, some over several lines
        reason = next(iter(str(error).split("\n")), "").strip() or type(error).__name__
        raise UnsupportedModel(f"{what} cannot be read: {reason}") from error
