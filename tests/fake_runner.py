"""FakeRunner: a runner without a model, which checks all that the engine asks of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import AdapterMode, Request, SampledToken
from adaplex.engine.sequence import VIRTUAL

BLOCK = 4
"""Tokens of a KV block, by default."""


def next_token(digest: str, tokens: Sequence[int]) -> int:
    """Returns a token that depends on the adapter and on every token before it."""
    return zlib.crc32(repr((digest, list(tokens))).encode()) % 997


def expected(request: Request) -> list[int]:
    """Returns the tokens of the request when it runs alone and to its length."""
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
    """Samples by `sample`. The KV cache is a dictionary, checked at every read; adapters occupy
    extents of the arena, checked for overlap.
    """

    def __init__(self, block_tokens: int = BLOCK) -> None:
        self.block_tokens = block_tokens
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
        """Errors of jobs, by digest."""
        self.failure: Exception | None = None
        """Error of every step."""
        self.on_run: Callable[[], object] = lambda: None
        """Called at the start of every step."""

    def run(self, batch: Batch) -> list[SampledToken]:
        """Takes 5 ms and 1 ms a row, by the clock `now`."""
        self.on_run()
        self.batches.append([Row.of(chunk) for chunk in batch.chunks])
        self.now += 0.005 + 0.001 * batch.tokens
        if self.failure is not None:
            raise self.failure
        self._check_tables(batch)
        for chunk in batch.chunks:
            self._check_adapter(chunk)
            self._write_and_read(chunk)
        return [self.sample(chunk) for chunk in batch.sampling]

    def sample(self, chunk: Chunk) -> SampledToken:
        adapter = chunk.sequence.adapter
        return SampledToken(next_token(adapter.digest if adapter else "", chunk.sequence.tokens))

    def step_costs(self) -> StepCosts:
        """A machine on which merging pays for an adapter that has the steps for itself."""
        return StepCosts((1, 16), (1.0, 2.0), (1.0, 2.0), (0.2, 0.4), 0.1)

    def pack_adapter(self, program: AdapterProgram) -> None:
        self.fetches.append(program.digest)
        self._fail(program.digest)
        assert program.digest not in self.host
        self.host.add(program.digest)

    def remove_host(self, digest: str) -> None:
        self.host.remove(digest)

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        assert digest in self.host, "there is no host copy"
        self._load(digest, offset, nbytes)

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        self._load(program.digest, offset, nbytes)

    def remove_adapter(self, digest: str) -> None:
        del self.extents[digest]

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        return FoldedShare(self.merged_size)

    def build_merged(self, program: AdapterProgram) -> int:
        self.loads.append(program.digest)
        self._fail(program.digest)
        self.merged.add(program.digest)
        return self.merged_size

    def remove_merged(self, digest: str) -> None:
        self.merged.remove(digest)

    def _load(self, digest: str, offset: int, nbytes: int) -> None:
        self.loads.append(digest)
        self._fail(digest)
        for start, size in self.extents.values():
            assert offset + nbytes <= start or start + size <= offset, "extents overlap"
        assert digest not in self.extents
        self.extents[digest] = (offset, nbytes)

    def _fail(self, digest: str) -> None:
        if digest in self.failing:
            raise self.failing[digest]

    def _check_tables(self, batch: Batch) -> None:
        """A block that is written is in no other table; decodes come first; adapters together."""
        for chunk in batch.chunks:
            first, last = chunk.start // self.block_tokens, (chunk.end - 1) // self.block_tokens
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
        sequence, size = chunk.sequence, self.block_tokens
        salt = sequence.request.cache_salt
        for position in range(chunk.end):
            cell = (sequence.blocks[position // size], position % size)
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
