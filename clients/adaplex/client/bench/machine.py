"""Machine: the processor that runs the load generator, and its memory's bandwidth."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 512 << 20
"""Larger than the processor's caches."""
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """A processor and its system. `bandwidth` is in bytes/s; None if it is unknown, or that of
    another machine.
    """

    processor: str
    cores: int
    system: str
    bandwidth: float | None

    @classmethod
    def here(cls, bandwidth: float | None) -> Machine:
        """Describes this machine."""
        return cls(_processor(), cores(), platform.platform(), bandwidth)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(
    nbytes: int = BUFFER_BYTES, threads: int | None = None, repeats: int = REPEATS
) -> float:
    """Measures the bytes/s at which all threads together read a buffer, the best of `repeats`.

    The threads call libc's memchr, which compares a vector at a time, through ctypes, which
    releases Python's lock. Raises OSError if libc cannot be loaded.
    """
    threads = threads or cores()
    search = _memchr()
    buffer = (ctypes.c_char * nbytes)()
    start = ctypes.addressof(buffer)
    ctypes.memset(start, 1, nbytes)  # unwritten pages would all map to one page of zeros
    part = nbytes // threads

    def read(index: int) -> int | None:
        return search(start + index * part, 0, part)

    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begun = time.perf_counter()
            assert not any(pool.map(read, range(threads)))
            fastest = min(fastest, time.perf_counter() - begun)
    return part * threads / fastest


def _memchr() -> Callable[[int, int, int], int | None]:
    try:
        function = ctypes.CDLL(None).memchr
    except (TypeError, AttributeError) as error:  # Windows
        raise OSError("libc cannot be loaded on this system") from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    function.restype = ctypes.c_void_p
    found: Callable[[int, int, int], int | None] = function
    return found


def _processor() -> str:
    """Returns the processor's name, from /proc/cpuinfo or from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
