"""A runner without a model, executors without threads, and makers of requests."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.program.traits import AdapterTraits
from adaplex.engine.auto_merge import AutoMerge
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import (
    AdapterMode,
    AdapterRef,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
)
from adaplex.engine.sequence import VIRTUAL

BLOCK = 4
"""Tokens a block."""
UNIT = 64
"""Bytes of the smallest adapter."""
MERGED, AUTO = AdapterMode.MERGED, AdapterMode.AUTO


def next_token(digest: str, tokens: Sequence[int]) -> int:
    return zlib.crc32(repr((digest, list(tokens))).encode()) % 997


def expected(request: Request) -> list[int]:
    """What the request yields when it runs alone and to its length."""
    digest = request.adapter.digest if request.adapter else ""
    tokens = [*range(VIRTUAL, VIRTUAL + request.leading), *request.prompt]
    known = len(tokens)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(digest, tokens))
    return tokens[known:]


class Row(NamedTuple):
    """A chunk as it was when it ran."""

    request_id: str
    adapter: str
    mode: str
    start: int
    length: int
    samples: bool

    @classmethod
    def of(cls, chunk: Chunk) -> Row:
        adapter = chunk.sequence.adapter
        name, mode = (adapter.name, adapter.mode.value) if adapter else ("", "")
        return cls(chunk.sequence.request_id, name, mode, chunk.start, chunk.count, chunk.samples)


class FakeRunner:
    """The next token is a function of the tokens and the adapter; the KV cache is a dictionary,
    checked at every read; adapters occupy extents, checked for overlap.
    """

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.now = 0.0
        self.cells: dict[tuple[int, int], tuple[str, str, int, int]] = {}
        self.extents: dict[str, tuple[int, int]] = {}
        self.merged: set[str] = set()
        self.merged_size = 100
        self.host: set[str] = set()
        self.fetches: list[str] = []
        self.loads: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.step_failure: Exception | None = None
        self.on_run: Callable[[], None] = lambda: None

    def run(self, batch: Batch) -> list[SampledToken]:
        self.on_run()
        self.batches.append([Row.of(chunk) for chunk in batch.chunks])
        self.now += 0.005 + 0.001 * batch.tokens
        if self.step_failure is not None:
            raise self.step_failure
        self._check_tables(batch)
        for chunk in batch.chunks:
            self._check_adapter(chunk)
            self._write_and_read(chunk)
        return [
            SampledToken(next_token(self._digest(chunk), chunk.sequence.tokens))
            for chunk in batch.sampling
        ]

    def step_costs(self) -> StepCosts:
        """A machine on which merging pays for an adapter that has the steps for itself."""
        return StepCosts((1, 16), (1.0, 2.0), (1.0, 2.0), (0.2, 0.4), 0.1)

    def pack_adapter(self, program: AdapterProgram) -> None:
        digest = program.digest
        self.fetches.append(digest)
        if digest in self.failing:
            raise self.failing[digest]
        assert digest not in self.host
        self.host.add(digest)

    def remove_host(self, digest: str) -> None:
        self.host.remove(digest)

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        assert digest in self.host, "there is no host copy"
        self._load(digest, offset, nbytes)

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        self._load(program.digest, offset, nbytes)

    def _load(self, digest: str, offset: int, nbytes: int) -> None:
        self.loads.append(digest)
        if digest in self.failing:
            raise self.failing[digest]
        for start, size in self.extents.values():
            assert offset + nbytes <= start or start + size <= offset, "extents overlap"
        assert digest not in self.extents
        self.extents[digest] = (offset, nbytes)

    def remove_adapter(self, digest: str) -> None:
        del self.extents[digest]

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        return FoldedShare(self.merged_size)

    def build_merged(self, program: AdapterProgram) -> int:
        digest = program.digest
        self.loads.append(digest)
        if digest in self.failing:
            raise self.failing[digest]
        self.merged.add(digest)
        return self.merged_size

    def remove_merged(self, digest: str) -> None:
        self.merged.remove(digest)

    @staticmethod
    def _digest(chunk: Chunk) -> str:
        return chunk.sequence.adapter.digest if chunk.sequence.adapter else ""

    @staticmethod
    def _check_tables(batch: Batch) -> None:
        """A block that is written is in no other table; decodes come first; adapters together."""
        for chunk in batch.chunks:
            first, last = chunk.start // BLOCK, (chunk.end - 1) // BLOCK
            written = set(chunk.sequence.blocks[first : last + 1])
            assert 0 not in written
            for other in batch.chunks:
                assert other is chunk or not written & set(other.sequence.blocks)
        order = [(not c.sequence.decoding, c.sequence.adapter_key) for c in batch.chunks]
        assert order == sorted(order)

    def _check_adapter(self, chunk: Chunk) -> None:
        if adapter := chunk.sequence.adapter:
            assert adapter.mode is not AdapterMode.AUTO
            loaded = self.merged if adapter.mode is AdapterMode.MERGED else self.extents
            assert adapter.digest in loaded, "adapter is not loaded"

    def _write_and_read(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        salt = sequence.request.cache_salt
        for position in range(chunk.end):
            cell = (sequence.blocks[position // BLOCK], position % BLOCK)
            key = sequence.adapter_key if position >= sequence.adapter_from else ""
            right = (key, salt, position, sequence.tokens[position])
            if position >= chunk.start:
                self.cells[cell] = right
            assert self.cells[cell] == right, "stale KV"


class FakeSource:
    """Has every adapter but those of `failing`; a program does nothing."""

    def __init__(self) -> None:
        self.failing: dict[str, Exception] = {}

    def program(self, digest: str) -> AdapterProgram:
        if digest in self.failing:
            raise self.failing[digest]
        return AdapterProgram(digest, "fake", ())


class ManualExecutor(Executor):
    """Runs a job when told to."""

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
    """Runs a job at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()


def digest(name: str) -> str:
    """That of the adapter that `make_adapter` makes of a name."""
    return f"sha256:{name}"


class EagerMerge(AutoMerge):
    """Merging pays after so many steps with the adapter."""

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
    """An engine for which a step takes 5 ms, and a row 1 ms. In auto mode, merging pays after
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
    """Steps an engine, checks it after each step, and gathers the outputs by request."""

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
        """Drains, and completes every job, also those that nobody waits for."""
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
    """Adds the requests, runs them to the end and checks every answer."""
    ledger = Ledger(engine)
    for request in requests:
        engine.add(request)
    ledger.drain()
    for request in requests:
        assert ledger.tokens(request.request_id) == expected(request)
    return ledger
