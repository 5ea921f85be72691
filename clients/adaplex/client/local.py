"""LocalServer: `adaplex serve` as a child process, for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from adaplex.client.client import Client
from adaplex.client.errors import DeadlineExceeded, Unavailable

START_SECONDS = 600.0
STOP_SECONDS = 600.0
"""Bounds of the waits for SERVING and for the end of the process; generous, for slow machines."""
POLL_SECONDS = 1.0
"""Time of one health check; the process is polled after each."""

LogRecord = Mapping[str, Any]


def free_port() -> int:
    """Returns a loopback port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ignore_record(_record: LogRecord) -> None:
    """Drops a log record."""


class LocalServer:
    """A server on free loopback ports; the end of `with` drains it and waits for its exit.

    `settings` are those of `adaplex serve`, by name. `on_log` is called with each log record
    (`event`, `level` and more) on a thread of its own; a line that is not a record is passed as an
    event of level `unknown`.
    """

    def __init__(
        self, *, on_log: Callable[[LogRecord], None] = ignore_record, **settings: object
    ) -> None:
        self.port, self.http_port = free_port(), free_port()
        given = {"port": self.port, "http_port": self.http_port, "log_format": "json", **settings}
        command = [str(Path(sys.executable).with_name("adaplex")), "serve"]
        for name, value in given.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        self._reading = threading.Thread(target=self._read, args=(on_log,), daemon=True)
        self._reading.start()

    @property
    def target(self) -> str:
        """Host and gRPC port, for a client."""
        return f"127.0.0.1:{self.port}"

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Waits until the server is SERVING.

        Raises Unavailable if the process ends before, DeadlineExceeded after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if (code := self.process.poll()) is not None:
                raise Unavailable(f"the server ended with code {code} before it was ready")
            with Client(self.target) as client:
                try:
                    return client.wait_ready(POLL_SECONDS)
                except DeadlineExceeded:
                    if time.monotonic() > deadline:
                        raise

    def stop(self) -> int:
        """Drains the server, waits for its end and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def kill(self) -> int:
        """Kills the server as kill -9 does and returns its exit code."""
        self.process.kill()
        return self._wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> int:
        code = self.process.wait(STOP_SECONDS)
        self._reading.join(STOP_SECONDS)
        return code

    def _read(self, on_log: Callable[[LogRecord], None]) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                record = {"event": line.decode(errors="replace").rstrip(), "level": "unknown"}
            on_log(record)
