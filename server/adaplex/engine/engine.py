"""Engine: runs requests step by step. Not thread-safe: one thread owns it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from itertools import count

from adaplex.engine.batch import Batch
from adaplex.engine.block_manager import BlockManager
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import (
    DeadlineExpired,
    EngineFailed,
    LogitsOverflowed,
    QueueFull,
    RequestInvalid,
)
from adaplex.engine.load_jobs import AdapterSource
from adaplex.engine.observer import Observer, SilentObserver
from adaplex.engine.prefill_budget import PrefillPolicy
from adaplex.engine.request import (
    OVERFLOWED,
    FinishReason,
    Request,
    SampledToken,
    StepOutput,
)
from adaplex.engine.residency import Residency
from adaplex.engine.runner import Runner
from adaplex.engine.scheduler import Scheduler
from adaplex.engine.sequence import Sequence
from adaplex.engine.stats import EngineStats, collect_stats

RETRY_SECONDS = (0.5, 30.0)
"""Bounds of the delay that QueueFull advises."""


def _nothing() -> None:
    """The default of `Engine.on_load`."""


class Engine:
    """Runs requests in steps. Slow work on adapters runs on `executor`, by default small pools.

    `clock` measures the seconds of steps. `on_load` is called on a thread of LoadJobs when a `step`
    can collect a load; it may be replaced before the first request.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        source: AdapterSource,
        *,
        base_digest: str,
        observer: Observer | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.on_load: Callable[[], None] = _nothing
        self.stalled = True
        """True if the last step ran nothing; without a call or a load the next runs nothing too."""
        self._runner = runner
        self._observer = observer or SilentObserver()
        self._blocks = BlockManager(config, base_digest)
        self._residency = Residency(
            config,
            runner,
            source,
            self._observer,
            on_completion=lambda: self.on_load(),
            executor=executor,
        )
        self._clock, self._prefill = clock, PrefillPolicy(config)
        self._scheduler = Scheduler(
            config, self._blocks, self._residency, self._observer, self._prefill
        )
        self._sequences: dict[str, Sequence] = {}
        self._numbers = count()
        self._outputs: list[StepOutput] = []
        self._service_seconds: deque[float] = deque(maxlen=64)
        """Seconds from admission to the end, of recent requests."""
        self._update_stats()

    @property
    def has_work(self) -> bool:
        """True if any request waits or runs."""
        return bool(self._sequences)

    @property
    def next_deadline(self) -> float | None:
        """Earliest deadline of all requests in `time.monotonic()` seconds; None without any."""
        deadlines = (sequence.request.deadline for sequence in self._sequences.values())
        return min((time for time in deadlines if time is not None), default=None)

    def stats(self) -> EngineStats:
        """Returns how full the engine was after the last call; safe from any thread."""
        return self._stats

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises RequestInvalid, AdapterTooLarge, NoRoomBesidePins or QueueFull.
        """
        if request.request_id in self._sequences:
            raise RequestInvalid("request_id", f"{request.request_id} is in use")
        request.check(self.config)
        if request.adapter is not None:
            self._residency.check(request.adapter)
        if self._free_places() <= 0:
            raise QueueFull(self.config.max_waiting, self._retry_after())
        if request.adapter is not None:
            self._residency.record_request(request.adapter)
        sequence = Sequence(request, number=next(self._numbers))
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self._update_stats()

    def abort(self, request_id: str) -> None:
        """Ends a request without an output; does nothing if it has ended."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence, None)
            self._update_stats()

    def unload(self, digest: str) -> bool:
        """Drops an adapter from memory once no request uses it; returns True if it was there."""
        resident = self._residency.unload(digest)
        self._update_stats()
        return resident

    def pin(self, digest: str, packed_bytes: int, name: str) -> None:
        """Loads an adapter into the arena and exempts it from eviction until it is unpinned,
        unloaded, or fails to load. Raises PinsFull.
        """
        self._residency.pin(digest, packed_bytes, name)
        self._update_stats()

    def unpin(self, digest: str) -> None:
        """Makes a pinned adapter evictable."""
        self._residency.unpin(digest)
        self._update_stats()

    def step(self) -> list[StepOutput]:
        """Collects loads, ends expired requests, runs one batch; at most one output a request."""
        now = time.monotonic()
        self._collect_loads()
        self._expire(now)
        batch = self._scheduler.schedule(now)
        if batch.chunks:
            self._run(batch, now)
        self.stalled = not batch.chunks and not self._residency.has_failures
        self._update_stats()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Waits for running loads. The last call."""
        self._residency.close()

    def check_integrity(self) -> None:
        """Asserts that blocks, leases and arena bytes balance with the unfinished sequences."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        assert {*running, *waiting} == set(self._sequences.values())
        assert len(running) + len(waiting) == len(self._sequences)
        assert not any(sequence.blocks for sequence in waiting)
        self._blocks.check_integrity(running)
        self._residency.check_integrity(running)

    def _free_places(self) -> int:
        """Returns how many requests may be added: those that may run, and those that may wait."""
        return self.config.max_running + self.config.max_waiting - len(self._sequences)

    def _retry_after(self) -> float:
        """Returns the seconds that a full queue takes, by the durations of recent requests."""
        seconds = self._service_seconds
        mean = sum(seconds) / len(seconds) if seconds else 0.0
        shortest, longest = RETRY_SECONDS
        return min(max(mean * self.config.max_waiting / self.config.max_running, shortest), longest)

    def _collect_loads(self) -> None:
        for failure in self._residency.collect():
            for sequence in filter(failure.hits, tuple(self._scheduler.waiting)):
                self._fail(sequence, failure.error())

    def _expire(self, now: float) -> None:
        for sequence in tuple(self._sequences.values()):
            deadline = sequence.request.deadline
            if deadline is not None and deadline <= now:
                self._fail(sequence, DeadlineExpired("the request's deadline has passed"))

    def _run(self, batch: Batch, now: float) -> None:
        """Runs the batch; if that fails, its sequences fail, and no others."""
        begin = self._clock()
        try:
            tokens = self._runner.run(batch)
            pairs = zip(batch.sampling, tokens, strict=True)
            sampled = {chunk.sequence: token for chunk, token in pairs}
        except Exception as cause:
            for chunk in batch.chunks:
                error = EngineFailed(f"the step failed: {cause}")
                error.__cause__ = cause
                self._fail(chunk.sequence, error)
            return
        self._prefill.record(batch, self._clock() - begin)
        self._residency.record_step(batch)
        self._postprocess(batch, sampled, now, time.monotonic())
        self._observer.stepped(rows=batch.tokens)

    def _postprocess(
        self, batch: Batch, sampled: Mapping[Sequence, SampledToken], begun: float, ended: float
    ) -> None:
        """Records the computed tokens, then appends and emits the new ones."""
        for chunk in batch.chunks:
            sequence, token = chunk.sequence, sampled.get(chunk.sequence)
            if token is not None and token.token == OVERFLOWED:
                name = sequence.adapter.name if sequence.adapter else None
                self._fail(sequence, LogitsOverflowed(name))
                continue
            sequence.computed = chunk.end
            self._blocks.publish(sequence)
            self._emit(sequence, token, begun, ended)

    def _emit(
        self, sequence: Sequence, sampled: SampledToken | None, begun: float, ended: float
    ) -> None:
        """Emits one output if the sequence was first scheduled in this step or has a new token."""
        admitted = sequence.admitted_at is None
        if admitted:
            sequence.admitted_at = begun
        elif sampled is None:
            return
        output = StepOutput(
            sequence.request_id,
            admitted=admitted,
            adapter=sequence.adapter if admitted else None,
            timing=sequence.timing(begun) if admitted else None,
            tokens=(sampled.token,) if sampled else (),
            at=ended,
            logprobs=(sampled.logprob,) if sampled and sampled.logprob else (),
            finish=self._append(sequence, sampled.token, ended) if sampled else None,
        )
        if output.last:
            self._finish(sequence, output)
        else:
            self._outputs.append(output)

    def _append(self, sequence: Sequence, token: int, now: float) -> FinishReason | None:
        """Appends a new token; returns why it is the last one, None if it is not."""
        sequence.tokens.append(token)
        self._scheduler.charge_output(sequence)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        return self._finish_reason(sequence)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Returns why the newest token is the last one, None if it is not.

        The engine ends requests at stop tokens, at `max_tokens` and at the context length. Stop
        strings need text: the server's Response finds them, and then aborts the request here.
        """
        sampling = sequence.request.sampling
        stops = sequence.tokens[-1] in sampling.stop_token_ids
        if stops and sequence.output_len > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.output_len >= sampling.max_tokens or len(sequence) >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._finish(sequence, StepOutput(sequence.request_id, error=error))

    def _finish(self, sequence: Sequence, output: StepOutput | None) -> None:
        """The only exit: for a normal end, an abort (no output), a deadline and a failure."""
        del self._sequences[sequence.request_id]
        self._scheduler.remove(sequence)
        self._blocks.free(sequence)
        self._residency.release(sequence)
        now = time.monotonic()
        if sequence.admitted_at is not None:
            self._service_seconds.append(now - sequence.admitted_at)
        if output is not None:
            self._outputs.append(replace(output, timing=sequence.timing(now)))

    def _update_stats(self) -> None:
        self._stats = collect_stats(self.config, self._blocks, self._residency, self._scheduler)
