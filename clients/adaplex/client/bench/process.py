"""ProcessMonitor: processor time and memory of a server on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

POLL_SECONDS = 0.2
"""Interval at which the resident memory is sampled."""
MISSING = "processor time and memory need psutil: pip install 'adaplex[bench]'"


@dataclass(frozen=True)
class ProcessUsage:
    """Use of one process during a run. `cores` is in processor seconds a second, `peak_bytes` is
    resident memory.
    """

    cores: float
    peak_bytes: int
    client_cores: float
    """The cores of this process, the load generator, which competes with a server beside it."""


class ProcessMonitor:
    """Measures one process of this machine.

    Raises RuntimeError if psutil is missing, LookupError if there is no process `pid`.
    """

    def __init__(self, pid: int) -> None:
        psutil = _psutil()
        try:
            self._process = psutil.Process(pid)
        except psutil.Error as error:
            raise LookupError(str(error)) from error
        self._own = psutil.Process()

    @contextmanager
    def measure(self) -> Iterator[list[ProcessUsage]]:
        """Measures a `with` block; appends its usage to the yielded list at the end."""
        usages: list[ProcessUsage] = []
        ended, peak = threading.Event(), [self._resident()]

        def poll() -> None:
            while not ended.wait(POLL_SECONDS):
                peak.append(max(peak.pop(), self._resident()))

        polling = threading.Thread(target=poll, daemon=True)
        polling.start()
        started, spent, own = time.perf_counter(), _seconds(self._process), _seconds(self._own)
        try:
            yield usages
        finally:
            ended.set()
            polling.join()
        elapsed = time.perf_counter() - started
        usages.append(
            ProcessUsage(
                cores=(_seconds(self._process) - spent) / elapsed,
                peak_bytes=max(*peak, self._resident()),
                client_cores=(_seconds(self._own) - own) / elapsed,
            )
        )

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


def listening_pid(port: int) -> int:
    """Returns the process that listens on a port of this machine.

    Raises LookupError if none of this user's does, RuntimeError if psutil is missing.
    """
    psutil = _psutil()
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.Error as error:
        raise LookupError(f"no permission to list this machine's sockets: {error}") from error
    for socket in sockets:
        if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port and socket.pid:
            return int(socket.pid)
    raise LookupError(f"no process of this user listens on port {port}")


def _seconds(process: object) -> float:
    times = process.cpu_times()  # type: ignore[attr-defined]  # psutil has no types
    return float(times.user + times.system)


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise RuntimeError(MISSING) from error
    module: ModuleType = psutil
    return module
