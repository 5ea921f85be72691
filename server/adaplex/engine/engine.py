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
from adaplex.engine.stats import EngineStats, count_engine

RETRY_SECONDS = (0.5, 30.0)
"""Bounds of what QueueFull advises."""


def _nothing() -> None:
    """The default of `Engine.on_load`."""


class Engine:
    """Requests in, tokens out. Slow work on adapters runs on `executor`, by default a small pool.

    `clock` measures steps, for the pace. `on_load` is called on a loader thread when a `step` can
    take in what was loaded; it may be replaced before the first request.
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
        """Whether the last step ran nothing: another does neither, until something comes in."""
        self._runner = runner
        self._observer = observer or SilentObserver()
        self._blocks = BlockManager(config, base_digest)
        self._residency = Residency(
            *(config, runner, source, self._observer),
            on_completion=lambda: self.on_load(),
            executor=executor,
        )
        self._clock, self._pace = clock, PrefillPolicy(config)
        self._scheduler = Scheduler(
            config, self._blocks, self._residency, self._observer, self._pace
        )
        self._sequences: dict[str, Sequence] = {}
        self._numbers = count()
        self._outputs: list[StepOutput] = []
        self._service_seconds: deque[float] = deque(maxlen=64)
        """From admission to the end, of recent requests."""
        self._update_stats()

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._sequences)

    @property
    def next_deadline(self) -> float | None:
        """When the first request in work expires."""
        deadlines = (sequence.request.deadline for sequence in self._sequences.values())
        return min((time for time in deadlines if time is not None), default=None)

    def stats(self) -> EngineStats:
        """How full the engine was after the last call; safe from any thread."""
        return self._stats

    def add(self, request: Request) -> None:
        """Takes a request in. Raises RequestInvalid, AdapterTooLarge, NoRoomBesidePins or
        QueueFull.
        """
        if request.request_id in self._sequences:
            raise RequestInvalid("request_id", f"{request.request_id} is in use")
        request.check(self.config)
        if request.adapter is not None:
            self._residency.check(request.adapter)
        if self._places() <= 0:
            raise QueueFull(self.config.max_waiting, self._retry_after())
        if request.adapter is not None:
            self._residency.record_request(request.adapter)
        sequence = Sequence(request, number=next(self._numbers))
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self._update_stats()

    def abort(self, request_id: str) -> None:
        """Ends a request without an output; one that has ended is left alone."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence, None)
            self._update_stats()

    def unload(self, digest: str) -> bool:
        """Drops an adapter from memory as soon as nothing runs with it; whether it was there."""
        resident = self._residency.unload(digest)
        self._update_stats()
        return resident

    def pin(self, digest: str, packed_bytes: int, name: str) -> None:
        """Brings an adapter into the arena unasked, and keeps it there until it is unpinned,
        unloaded or found impossible to load. Raises PinsFull.
        """
        self._residency.pin(digest, packed_bytes, name)
        self._update_stats()

    def unpin(self, digest: str) -> None:
        """Makes a pinned adapter one like others."""
        self._residency.unpin(digest)
        self._update_stats()

    def step(self) -> list[StepOutput]:
        """Takes in loads, ends what is late, runs one batch; at most one output a request."""
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
        """Waits for the loader; to be called last."""
        self._residency.close()

    def check_integrity(self) -> None:
        """Asserts that blocks, leases and arena bytes balance with the sequences in work."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        assert {*running, *waiting} == set(self._sequences.values())
        assert len(running) + len(waiting) == len(self._sequences)
        assert not any(sequence.blocks for sequence in waiting)
        self._blocks.check_integrity(running)
        self._residency.check_integrity(running)

    def _places(self) -> int:
        """Requests that may still come: those that the next step could start, and the queue."""
        return self.config.max_running + self.config.max_waiting - len(self._sequences)

    def _retry_after(self) -> float:
        """Seconds that the queue takes, at the pace of recent requests."""
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
        """Runs the batch; if that fails, its sequences do, and only they."""
        begun = self._clock()
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
        self._pace.note(batch, self._clock() - begun)
        self._residency.record_step(batch)
        self._postprocess(batch, sampled, now, time.monotonic())
        self._observer.stepped(rows=batch.tokens)

    def _postprocess(
        self, batch: Batch, sampled: Mapping[Sequence, SampledToken], begun: float, ended: float
    ) -> None:
        """Books what was computed, then appends and emits the new tokens."""
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
        """One output for a sequence that was first scheduled in this step or has a new token."""
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
        """Books a new token; why it is the last one, if it is."""
        sequence.tokens.append(token)
        self._scheduler.charge_output(sequence)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        return self._finish_reason(sequence)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the newest token is the last one; None if it is not."""
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
        """The one way out: for a normal end, an abort (no output), a deadline and a failure."""
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
        self._stats = count_engine(self.config, self._blocks, self._residency, self._scheduler)
