"""Errors of the edge itself.

AdaplexError            (adaplex.adapters.errors)
└── RequestError        (adaplex.engine.errors)
    ├── UploadsBusy     too many uploads at once; says when to try again
    └── UploadIdle      the client of an upload fell silent
"""

from __future__ import annotations

from adaplex.engine.errors import RequestError


class UploadsBusy(RequestError):
    """As many adapters as allowed are being taken in already."""

    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{limit} uploads are under way already; try again in {retry_after:.1f} s")
        self.retry_after = retry_after
        """Seconds."""


class UploadIdle(RequestError):
    """Nothing came from the client of an upload for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing was received for {seconds:g} s")
