"""Machine: where the load is made, and how fast its memory can be read."""

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
"""Larger than the caches."""
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """`bandwidth` is in bytes/s; None where it could not be measured, or says nothing."""

    processor: str
    cores: int
    system: str
    bandwidth: float | None

    @classmethod
    def here(cls, bandwidth: float | None) -> Machine:
        """This machine."""
        return cls(_processor(), cores(), platform.platform(), bandwidth)


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(
    nbytes: int = BUFFER_BYTES, threads: int | None = None, repeats: int = REPEATS
) -> float:
    """Bytes/s at which all threads together read a buffer, the best of several times.

    libc's memchr does the reading: it compares a vector at a time, and ctypes calls it without
    Python's lock. OSError where there is no libc to load.
    """
    threads = threads or cores()
    search = _memchr()
    buffer = (ctypes.c_char * nbytes)()
    start = ctypes.addressof(buffer)
    ctypes.memset(start, 1, nbytes)  # pages nobody wrote are all one page of zeros
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
        raise OSError("this system has no libc to load") from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    function.restype = ctypes.c_void_p
    found: Callable[[int, int, int], int | None] = function
    return found


def _processor() -> str:
    """The processor's name, as Linux or Python tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
