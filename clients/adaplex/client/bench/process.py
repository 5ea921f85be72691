"""Usage: processor time and memory of the server, when it runs on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

LOOK_SECONDS = 0.2
"""Between two looks at the memory."""
MISSING = "processor time and memory need psutil: pip install 'adaplex[bench]'"


@dataclass(frozen=True)
class Usage:
    """Of one process during a run. `cores` is processor seconds a second, bytes are resident."""

    cores: float
    peak_bytes: int
    client_cores: float
    """Of this process, which makes the load; where both share a machine it costs the server."""


class ProcessWatch:
    """Watches one process of this machine. RuntimeError when psutil is missing, LookupError when
    there is no such process.
    """

    def __init__(self, pid: int) -> None:
        psutil = _psutil()
        try:
            self._process = psutil.Process(pid)
        except psutil.Error as error:
            raise LookupError(str(error)) from error
        self._own = psutil.Process()

    @contextmanager
    def watching(self) -> Iterator[list[Usage]]:
        """Puts the usage of the block into the list when it is left."""
        found: list[Usage] = []
        ended, peak = threading.Event(), [self._resident()]

        def look() -> None:
            while not ended.wait(LOOK_SECONDS):
                peak.append(max(peak.pop(), self._resident()))

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        begun, spent, own = time.perf_counter(), _seconds(self._process), _seconds(self._own)
        try:
            yield found
        finally:
            ended.set()
            looking.join()
        elapsed = time.perf_counter() - begun
        found.append(
            Usage(
                cores=(_seconds(self._process) - spent) / elapsed,
                peak_bytes=max(*peak, self._resident()),
                client_cores=(_seconds(self._own) - own) / elapsed,
            )
        )

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


def listener(port: int) -> int:
    """The process that listens on a port of this machine. LookupError, or RuntimeError as above."""
    psutil = _psutil()
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.Error as error:
        raise LookupError(f"the listeners of this machine are not ours to see: {error}") from error
    for socket in sockets:
        if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port and socket.pid:
            return int(socket.pid)
    raise LookupError(f"no process of ours listens on port {port}")


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
