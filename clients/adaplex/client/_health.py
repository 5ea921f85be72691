"""The wire format of grpc.health.v1, without its package, and the wait for a ready server."""

from __future__ import annotations

import time

from adaplex.client.errors import AdaplexClientError, DeadlineExceeded, Unavailable
from adaplex.client.types import Health

METHOD = "/grpc.health.v1.Health/Check"
POLL_SECONDS = 0.1
"""Pause between two health checks of a server that answers but is not ready."""

_STATUS_OF = {1: Health.SERVING, 2: Health.NOT_SERVING}


def encode(service: str) -> bytes:
    """Encodes a `HealthCheckRequest`: field 1 is the service's name, absent for the whole server.

    Raises ValueError for a name of more than 127 bytes, whose length would take two bytes.
    """
    name = service.encode()
    if len(name) > 127:
        raise ValueError("a service name has at most 127 bytes")
    return bytes([0x0A, len(name)]) + name if name else b""


def decode(message: bytes) -> Health:
    """Decodes the status of a `HealthCheckResponse`: field 1, an enum, absent when it is zero."""
    known = len(message) == 2 and message[0] == 0x08
    return _STATUS_OF.get(message[1], Health.UNKNOWN) if known else Health.UNKNOWN


class Readiness:
    """Decides after each health check whether to wait for the server any longer."""

    def __init__(self, target: str, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    @property
    def remaining(self) -> float:
        """Seconds left for the next health check."""
        return max(0.0, self._deadline - time.monotonic())

    def is_ready(self, result: Health | AdaplexClientError) -> bool:
        """True if the result of a health check is SERVING, False if another check may be.

        Raises DeadlineExceeded at the end of the timeout, and a `result` that is an error which
        waiting cannot mend.
        """
        if result is Health.SERVING:
            return True
        if not isinstance(result, Health | Unavailable | DeadlineExceeded):
            raise result
        if self.remaining <= POLL_SECONDS or isinstance(result, DeadlineExceeded):
            message = f"{self._target} was not ready within {self._timeout:g} s ({result})"
            raise DeadlineExceeded(message)
        return False
