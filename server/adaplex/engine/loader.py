"""Loader: slow work on adapters, off the engine thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from queue import Empty, SimpleQueue

THREADS = 2
MAX_PENDING = 4
"""Enough to keep the threads busy; a later, more urgent load waits for no more than these."""


class Job(Enum):
    """What is done to an adapter."""

    LOAD = auto()
    """Into the arena."""
    MEASURE = auto()
    """How many bytes its merged weights take."""
    BUILD = auto()
    """Its merged weights."""


@dataclass(frozen=True)
class Completion:
    """One job is over: with `result` (bytes, for MEASURE) or with `error`."""

    job: Job
    digest: str
    seconds: float
    result: int = 0
    error: BaseException | None = None


class Loader:
    """Runs jobs on `executor` (a small pool of its own by default) and collects completions.

    `on_completion` is called on the loader's thread when `collect` would yield something.
    """

    def __init__(self, on_completion: Callable[[], None], executor: Executor | None = None) -> None:
        self.pending = 0
        """Jobs submitted and not collected."""
        self._on_completion = on_completion
        self._own = None if executor else ThreadPoolExecutor(THREADS, "adapter-loader")
        self._executor = executor or self._own
        self._completions: SimpleQueue[Completion] = SimpleQueue()

    @property
    def full(self) -> bool:
        """Whether no further job should be submitted now."""
        return self.pending >= MAX_PENDING

    def submit(self, job: Job, digest: str, work: Callable[[], int | None]) -> None:
        """Runs `work` soon, on another thread."""
        assert self._executor is not None
        self.pending += 1
        self._executor.submit(self._run, job, digest, work)

    def collect(self) -> list[Completion]:
        """What has been completed since the last call, in order."""
        completions: list[Completion] = []
        try:
            while True:
                completions.append(self._completions.get_nowait())
        except Empty:
            self.pending -= len(completions)
            return completions

    def close(self) -> None:
        """Drops jobs that have not begun and waits for those that have."""
        if self._own is not None:
            self._own.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job, digest: str, work: Callable[[], int | None]) -> None:
        start = time.monotonic()
        try:
            result, error = work() or 0, None
        except BaseException as caught:  # a lost completion would leave its waiters hanging
            result, error = 0, caught
        seconds = time.monotonic() - start
        self._completions.put(Completion(job, digest, seconds, result, error))
        self._on_completion()
