"""Errors of the base model.

AdaplexError            (adaplex.adapters.errors)
└── ModelError
    ├── ModelSourceError    the model cannot be found, fetched, checked or converted
    └── UnsupportedModel    the model was read, but its architecture cannot be served
"""

from __future__ import annotations

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
