"""LoadJobs: slow work on adapters, off the engine thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from adaplex.engine.merge_cost_model import FoldedShare

if TYPE_CHECKING:  # it imports torch, which the engine does not
    from adaplex.adapters.program.program import AdapterProgram


class AdapterSource(Protocol):
    """Where adapters are stored. Called on the threads of LoadJobs."""

    def program(self, digest: str) -> AdapterProgram:
        """Reads and lowers a stored adapter. Raises an AdaplexError if it cannot be read."""
        ...


class Job(Enum):
    """What is done to an adapter."""

    FETCH = auto()
    """From the store into host memory."""
    COPY = auto()
    """From host memory into the arena."""
    LOAD = auto()
    """From the store into the arena, where host memory has no room."""
    MEASURE = auto()
    """What merging makes of it."""
    BUILD = auto()
    """Its merged weights."""


THREADS = {True: 1, False: 2}
"""Of the lane for copies, and of the one for everything slow: no copy ever waits for a disk."""
MAX_PENDING = {True: 8, False: 4}
"""Enough to keep the threads busy; a later, more urgent job waits for no more than these."""


@dataclass(frozen=True)
class Completion:
    """One job is over: with `result` (of MEASURE alone) or with `error`."""

    job: Job
    digest: str
    seconds: float
    result: FoldedShare | None = None
    error: BaseException | None = None


class LoadJobs:
    """Runs jobs on `executor` (two small pools of its own by default) and collects completions.

    `on_completion` is called on the loader's thread when `collect` would yield something.
    """

    def __init__(
        self,
        source: AdapterSource,
        on_completion: Callable[[], None],
        executor: Executor | None = None,
    ) -> None:
        self._source = source
        self._pending: Counter[bool] = Counter()
        """Jobs submitted and not collected, by lane: copies, and the others."""
        self._on_completion = on_completion
        self._own = () if executor else (_lane(fast=False), _lane(fast=True))
        self._lanes: tuple[Executor, ...] = (executor, executor) if executor else self._own
        self._completions: SimpleQueue[Completion] = SimpleQueue()

    @property
    def pending(self) -> int:
        """Jobs submitted and not collected."""
        return self._pending.total()

    def full(self, job: Job) -> bool:
        """Whether no further job of the kind should be submitted now."""
        fast = job is Job.COPY
        return self._pending[fast] >= MAX_PENDING[fast]

    def spare(self, job: Job) -> bool:
        """Whether the lane of the kind has a thread for work that nobody waits for yet, and another
        one for what is asked for meanwhile.
        """
        fast = job is Job.COPY
        return self._pending[fast] < THREADS[fast] - 1

    def submit(
        self, job: Job, digest: str, work: Callable[[AdapterProgram], FoldedShare | None]
    ) -> None:
        """Reads an adapter from the source and passes it to `work`, on another thread."""
        assert job is not Job.COPY
        self._submit(job, digest, lambda: work(self._source.program(digest)))

    def submit_copy(self, digest: str, copy: Callable[[], None]) -> None:
        """Runs `copy`, a COPY, on another thread; the source is not read."""
        self._submit(Job.COPY, digest, copy)

    def collect(self) -> list[Completion]:
        """What has been completed since the last call, in order."""
        completions: list[Completion] = []
        try:
            while True:
                completions.append(self._completions.get_nowait())
        except Empty:
            self._pending.subtract(done.job is Job.COPY for done in completions)
            return completions

    def close(self) -> None:
        """Drops jobs that have not begun and waits for those that have."""
        for lane in self._own:
            lane.shutdown(wait=True, cancel_futures=True)

    def _submit(self, job: Job, digest: str, work: Callable[[], FoldedShare | None]) -> None:
        fast = job is Job.COPY
        self._pending[fast] += 1
        self._lanes[fast].submit(self._run, job, digest, work)

    def _run(self, job: Job, digest: str, work: Callable[[], FoldedShare | None]) -> None:
        start = time.monotonic()
        try:
            result, error = work(), None
        except BaseException as caught:  # a lost completion would leave its waiters hanging
            result, error = None, caught
        seconds = time.monotonic() - start
        self._completions.put(Completion(job, digest, seconds, result, error))
        self._on_completion()


def _lane(*, fast: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS[fast], "adapter-copier" if fast else "adapter-loader")
