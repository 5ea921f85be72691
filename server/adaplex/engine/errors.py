"""Errors of requests.

AdaplexError            (adaplex.adapters.errors)
└── RequestError
    ├── RequestInvalid      a field is out of range; names the field and the limit
    ├── QueueFull           too many requests wait; says when to try again
    ├── PinsFull            pinned adapters may take no more of the arena, or leave no stretch
    ├── NoRoomBesidePins    pinned adapters leave no room for this one
    ├── ServerUnavailable   loading or draining
    ├── DeadlineExpired     the request's time ran out
    ├── LogitsOverflowed    the model overflowed for this request alone
    ├── AdapterLoadFailed   the adapter could not be brought into memory
    └── EngineFailed        a step failed; the request's work is lost
"""

from __future__ import annotations

from adaplex.adapters.errors import AdaplexError


class RequestError(AdaplexError):
    """Something is wrong with a request, or with serving it now."""


class RequestInvalid(RequestError):
    """A field of the request is out of range."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class QueueFull(RequestError):
    """The waiting queue is full."""

    def __init__(self, limit: int, retry_after: float) -> None:
        super().__init__(f"{limit} requests are waiting already; try again in {retry_after:.1f} s")
        self.retry_after = retry_after
        """Seconds."""


class PinsFull(RequestError):
    """Pinned adapters may take no more of the arena, or leave no stretch of it that is long enough
    for one more.
    """

    def __init__(self, name: str, nbytes: int, pinned: int, limit: int) -> None:
        super().__init__(
            f"pinned: {name} takes {nbytes} bytes in one stretch of the arena; "
            f"{pinned} are pinned of the {limit} that may be"
        )


class NoRoomBesidePins(RequestError):
    """Pinned adapters leave no room in the arena for this one, even if nothing else were there."""

    def __init__(self, name: str, nbytes: int, pinned: int, capacity: int) -> None:
        super().__init__(
            f"adapter {name} takes {nbytes} bytes; of the arena's {capacity}, {pinned} are pinned"
        )


class ServerUnavailable(RequestError):
    """The server is loading or draining."""


class DeadlineExpired(RequestError):
    """The request's deadline passed before it was done."""


class AdapterLoadFailed(RequestError):
    """The adapter could not be brought into memory."""


class LogitsOverflowed(RequestError):
    """The model overflowed for this request alone, most likely through its adapter."""

    def __init__(self, adapter: str | None) -> None:
        cause = "the base model" if adapter is None else f"adapter {adapter}"
        super().__init__(f"the logits of this request are not finite: {cause} overflows")


class EngineFailed(RequestError):
    """A step of the engine failed; the sequences in it are lost."""
