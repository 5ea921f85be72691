"""grpc.health.v1 without its package, and how long to wait for a server to be ready."""

from __future__ import annotations

import time

from adaplex.client.errors import AdaplexClientError, DeadlineExceeded, Unavailable
from adaplex.client.types import Health

METHOD = "/grpc.health.v1.Health/Check"
INTERVAL = 0.1
"""Seconds between two looks at a server that answers and is not ready."""

_STATUS_OF = {1: Health.SERVING, 2: Health.NOT_SERVING}


def encode(service: str) -> bytes:
    """A `HealthCheckRequest`: field 1, the service's name; absent for the whole server."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError("a service name has at most 127 bytes")
    return bytes([0x0A, len(name)]) + name if name else b""


def decode(message: bytes) -> Health:
    """The status of a `HealthCheckResponse`: field 1, an enum; absent when it is zero."""
    known = len(message) == 2 and message[0] == 0x08
    return _STATUS_OF.get(message[1], Health.UNKNOWN) if known else Health.UNKNOWN


class Readiness:
    """Decides, look after look, whether to wait on for a server or to give up."""

    def __init__(self, target: str, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    @property
    def remaining(self) -> float:
        """Seconds left for the next look."""
        return max(0.0, self._deadline - time.monotonic())

    def ready(self, seen: Health | AdaplexClientError) -> bool:
        """Whether waiting is over. Raises when time is, or when waiting cannot help."""
        if seen is Health.SERVING:
            return True
        if not isinstance(seen, Health | Unavailable | DeadlineExceeded):
            raise seen
        if self.remaining <= INTERVAL or isinstance(seen, DeadlineExceeded):
            message = f"{self._target} was not ready within {self._timeout:g} s ({seen})"
            raise DeadlineExceeded(message)
        return False
