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
    """The store of adapters, read on the threads of LoadJobs."""

    def program(self, digest: str) -> AdapterProgram:
        """Reads and lowers a stored adapter. Raises an AdaplexError if it cannot be read."""
        ...


class Job(Enum):
    """Kinds of jobs."""

    FETCH = auto()
    """Packs a stored adapter into host memory."""
    COPY = auto()
    """Copies an adapter from host memory into the arena."""
    LOAD = auto()
    """Packs a stored adapter into the arena, if host memory has no room."""
    MEASURE = auto()
    """Measures what merging makes of an adapter."""
    BUILD = auto()
    """Builds the merged weights of an adapter."""


THREADS = {True: 1, False: 2}
"""Threads of the lane for copies (True), and of the lane for all other jobs: no copy waits for a
disk."""
MAX_PENDING = {True: 8, False: 4}
"""Jobs of a lane that suffice to occupy its threads; a later, more urgent job waits for these at
most."""


@dataclass(frozen=True)
class Completion:
    """A job that has ended: with `result` (of MEASURE only) or with `error`."""

    job: Job
    digest: str
    seconds: float
    result: FoldedShare | None = None
    error: BaseException | None = None


class LoadJobs:
    """Runs jobs on `executor`, by default two small thread pools of its own, and collects their
    completions.

    Calls `on_completion` on the thread of a job when `collect` would return a completion.
    """

    def __init__(
        self,
        source: AdapterSource,
        on_completion: Callable[[], None],
        executor: Executor | None = None,
    ) -> None:
        self._source = source
        self._pending: Counter[bool] = Counter()
        """Jobs submitted and not collected, by lane: copies (True), and all others."""
        self._on_completion = on_completion
        self._own = () if executor else (_lane(fast=False), _lane(fast=True))
        self._lanes: tuple[Executor, ...] = (executor, executor) if executor else self._own
        self._completions: SimpleQueue[Completion] = SimpleQueue()

    @property
    def pending(self) -> int:
        """Number of jobs submitted and not collected."""
        return self._pending.total()

    def full(self, job: Job) -> bool:
        """Returns True if no further job of the kind should be submitted now."""
        fast = job is Job.COPY
        return self._pending[fast] >= MAX_PENDING[fast]

    def has_spare_thread(self, job: Job) -> bool:
        """Returns True if the lane of the kind has a thread for a job that no sequence waits for
        yet, and another one for an urgent job.
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
        """Runs `copy` as a COPY job on another thread, without reading the source."""
        self._submit(Job.COPY, digest, copy)

    def collect(self) -> list[Completion]:
        """Returns the jobs completed since the last call, in order."""
        completions: list[Completion] = []
        try:
            while True:
                completions.append(self._completions.get_nowait())
        except Empty:
            self._pending.subtract(done.job is Job.COPY for done in completions)
            return completions

    def close(self) -> None:
        """Cancels jobs that have not begun and waits for those that have."""
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
        except BaseException as caught:  # without a completion, sequences would wait for ever
            result, error = None, caught
        seconds = time.monotonic() - start
        self._completions.put(Completion(job, digest, seconds, result, error))
        self._on_completion()


def _lane(*, fast: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS[fast], "adapter-copier" if fast else "adapter-loader")
