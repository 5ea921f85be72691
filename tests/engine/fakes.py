"""Executors without threads, and makers of engines, adapters and requests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from threading import Event
from typing import Any

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.auto_merge import AutoMerge
from adaplex.engine.batch import Batch
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.request import (
    AdapterMode,
    AdapterRef,
    Request,
    SamplingParams,
    StepOutput,
)
from fake_runner import BLOCK, FakeRunner, FakeSource, Row, expected

UNIT = 64
"""Bytes of the smallest adapter."""
MERGED, AUTO = AdapterMode.MERGED, AdapterMode.AUTO


class ManualExecutor(Executor):
    """Runs jobs when the test calls `run`."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []
        self.submitted = Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(partial(fn, *args, **kwargs))
        self.submitted.set()
        return Future()

    def run(self, index: int = 0) -> None:
        self.jobs.pop(index)()

    def run_all(self) -> None:
        while self.jobs:
            self.run()


class InlineExecutor(Executor):
    """Runs a job when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()


def digest(name: str) -> str:
    """Returns the digest of the adapter that `make_adapter` makes of a name."""
    return f"sha256:{name}"


class EagerMerge(AutoMerge):
    """Merging pays after `steps` steps with the adapter."""

    def __init__(self, steps: int) -> None:
        super().__init__(None)
        self._needed = steps
        self._seen: Counter[str] = Counter()

    def record_step(self, batch: Batch) -> None:
        adapters = (chunk.sequence.adapter for chunk in batch.chunks)
        self._seen.update({adapter.digest for adapter in adapters if adapter})

    def has_enough_steps(self, digest: str) -> bool:
        return self.pays(digest)

    def pays(self, digest: str) -> bool:
        return self._seen[digest] >= self._needed

    def suspend(self, digest: str) -> None:
        del self._seen[digest]


def make_config(**changes: Any) -> EngineConfig:
    limits: dict[str, Any] = {
        "num_blocks": 65,
        "arena_bytes": 3 * UNIT,
        "block_tokens": BLOCK,
        "max_model_len": 64,
        "max_running": 8,
        "max_waiting": 100,
        "max_step_tokens": 24,
        "max_chunk_tokens": 8,
        "max_stretch": math.inf,
    }
    return EngineConfig(**(limits | changes))


def make_engine(
    executor: Executor | None = None,
    runner: FakeRunner | None = None,
    source: FakeSource | None = None,
    *,
    merge_after: int = 0,
    **changes: Any,
) -> tuple[Engine, FakeRunner]:
    """Returns an engine, and its runner, whose clock it uses. In auto mode, merging pays after
    `merge_after` steps with the adapter, if not 0.
    """
    runner = runner or FakeRunner()
    engine = Engine(
        make_config(**changes),
        runner,
        source or FakeSource(),
        base_digest="base",
        executor=executor or InlineExecutor(),
        clock=lambda: runner.now,
    )
    if merge_after:
        engine._residency._merged._auto = EagerMerge(merge_after)
    return engine, runner


def make_adapter(
    name: str = "a", nbytes: int = UNIT, mode: AdapterMode = AdapterMode.UNMERGED, **traits: Any
) -> AdapterRef:
    return AdapterRef(name, 1, digest(name), nbytes, AdapterTraits(modules=1, **traits), mode)


def make_request(
    request_id: str = "r",
    prompt: Sequence[int] = (1, 2, 3),
    adapter: AdapterRef | str | None = None,
    max_tokens: int = 4,
    **fields: Any,
) -> Request:
    sampling = fields.pop("sampling", SamplingParams(max_tokens=max_tokens))
    adapter = make_adapter(adapter) if isinstance(adapter, str) else adapter
    return Request(request_id, tuple(prompt), sampling, adapter, **fields)


class Ledger:
    """Steps an engine, checks it after each step, and collects the outputs by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[StepOutput]] = {}

    def step(self) -> list[StepOutput]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            seen = self.outputs.setdefault(output.request_id, [])
            assert not (seen and seen[-1].last), "an output after the last"
            seen.append(output)
        return outputs

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.engine.has_work:
                self.check_idle()
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def drain_with(self, executor: ManualExecutor, limit: int = 2000) -> None:
        """Drains, and completes every job, also jobs that no request waits for."""
        for _ in range(limit):
            executor.run_all()
            self.step()
            if not self.engine.has_work and not executor.jobs:
                self.check_idle()
                return
        raise AssertionError("the engine does not come to an end")

    def check_idle(self) -> None:
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.tokens]

    def last(self, request_id: str) -> StepOutput:
        return self.outputs[request_id][-1]

    def error(self, request_id: str) -> Exception | None:
        return self.last(request_id).error


def run_all(engine: Engine, requests: Sequence[Request]) -> Ledger:
    """Adds the requests, runs them to the end and checks the tokens of each."""
    ledger = Ledger(engine)
    for request in requests:
        engine.add(request)
    ledger.drain()
    for request in requests:
        assert ledger.tokens(request.request_id) == expected(request)
    return ledger


def run_rows(engine: Engine, runner: FakeRunner, request: Request) -> list[Row]:
    """Runs a request alone to the end, checks its tokens and returns its rows."""
    begin = len(runner.batches)
    run_all(engine, [request])
    return [row for batch in runner.batches[begin:] for row in batch]


def recomputed(runner: FakeRunner) -> set[str]:
    """Returns the ids of requests with rows that ran twice, because of preemption."""
    rows = Counter((row.request_id, row.start) for batch in runner.batches for row in batch)
    return {request_id for (request_id, _), count in rows.items() if count > 1}


async def collect_tokens(server: AsyncEngine, request: Request) -> list[int]:
    """Runs a request on a server and returns its tokens."""
    return [
        token
        async for outputs in server.generate(request)
        for output in outputs
        for token in output.tokens
    ]
