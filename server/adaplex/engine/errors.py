"""Errors of requests.

AdaplexError            (adaplex.adapters.errors)
└── RequestError
    ├── RequestInvalid      a field is out of range; names the field and the limit
    ├── QueueFull           too many requests wait; says when to try again
    ├── PinsFull            pins may take no more of the arena, or leave no contiguous range
    ├── NoRoomBesidePins    pins leave no room for the adapter of a request
    ├── ServerUnavailable   the server is starting or draining
    ├── DeadlineExpired     the request's deadline passed
    ├── LogitsOverflowed    the logits of this request alone are not finite
    ├── AdapterLoadFailed   the adapter could not be loaded into memory
    └── EngineFailed        a step failed; the sequences in it are lost
"""

from __future__ import annotations

from adaplex.adapters.errors import AdaplexError


class RequestError(AdaplexError):
    """A request is invalid, or cannot be served now."""


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
    """Pins may take no more of the arena, or leave no contiguous range that is long enough."""

    def __init__(self, name: str, nbytes: int, pinned: int, limit: int) -> None:
        super().__init__(
            f"pinned: {name} takes {nbytes} contiguous bytes of the arena; "
            f"pins take {pinned} of the {limit} that they may"
        )


class NoRoomBesidePins(RequestError):
    """Pins leave no room in the arena for an adapter, even if all other adapters were evicted."""

    def __init__(self, name: str, nbytes: int, pinned: int, capacity: int) -> None:
        super().__init__(
            f"adapter {name} takes {nbytes} bytes; of the arena's {capacity}, {pinned} are pinned"
        )


class ServerUnavailable(RequestError):
    """The server is starting or draining."""


class DeadlineExpired(RequestError):
    """The request's deadline passed before it ended."""


class AdapterLoadFailed(RequestError):
    """The adapter could not be loaded into memory."""


class LogitsOverflowed(RequestError):
    """The logits of this request alone are not finite, most likely because of its adapter."""

    def __init__(self, adapter: str | None) -> None:
        cause = "the base model" if adapter is None else f"adapter {adapter}"
        super().__init__(f"the logits of this request are not finite: {cause} overflows")


class EngineFailed(RequestError):
    """A step of the engine failed; the sequences in it are lost."""
