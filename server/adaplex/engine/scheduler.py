"""Scheduler: which tokens the next step computes."""

from __future__ import annotations

from bisect import insort

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.block_manager import BlockManager
from adaplex.engine.config import EngineConfig
from adaplex.engine.observer import Observer
from adaplex.engine.residency import Residency
from adaplex.engine.sequence import Sequence, Status
from adaplex.engine.waiting import WaitingQueue


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank


def _by_adapter(chunks: list[Chunk]) -> list[Chunk]:
    return sorted(chunks, key=lambda chunk: chunk.sequence.adapter_key)


class Scheduler:
    """Waiting sequences, in turn, and running ones, most urgent first.

    A running sequence holds blocks for all its known tokens and a lease on its adapter; a waiting
    one holds nothing. The most urgent running sequence always goes on: it can take the blocks of
    all others, and the cache holds a sequence of any allowed length.
    """

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, residency: Residency, observer: Observer
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._residency = residency
        self._observer = observer
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its priority and adapter that came before it."""
        sequence.status = Status.WAITING
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence; its blocks and lease are the caller's to free."""
        queue = self.waiting if sequence.status is Status.WAITING else self.running
        queue.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, now: float) -> Batch:
        """The next step: every decoding sequence, then prompts under way, then new ones.

        Empty only if every waiting sequence waits for its adapter.
        """
        decodes = self._decode()
        prompts: list[Chunk] = []
        room = self._config.max_step_tokens - len(decodes)
        room -= self._continue_prompts(prompts, room)
        self._admit(prompts, room, now)
        return Batch((*_by_adapter(decodes), *_by_adapter(prompts)))

    def _decode(self) -> list[Chunk]:
        """One row for each decoding sequence; when blocks run out, the least urgent give way."""
        chunks: list[Chunk] = []
        for sequence in tuple(self.running):
            if sequence.status is not Status.RUNNING or not sequence.decoding:
                continue
            while sequence.status is Status.RUNNING and not self._blocks.extend(sequence):
                self._preempt(self.running[-1])
            if sequence.status is Status.RUNNING:
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting, to be computed again: only its tokens and its mode are kept."""
        self.remove(sequence)
        self._blocks.free(sequence)
        self._residency.release(sequence)
        self.add(sequence)
        self._observer.preempted()

    def _continue_prompts(self, chunks: list[Chunk], room: int) -> int:
        """Adds chunks of running prompts; returns their rows."""
        rows = 0
        for sequence in self.running:
            if not sequence.decoding:
                rows += self._add_chunk(chunks, sequence, room - rows)
        return rows

    def _admit(self, chunks: list[Chunk], room: int, now: float) -> None:
        """Starts waiting sequences in turn while rows, places and blocks last.

        One whose adapter is not there is passed over; one that finds no blocks is not, so that
        long prompts get their turn. When nothing more can start, the next few are still asked
        for, and adapters of more are fetched, so that they are there in time.
        """
        self._residency.start_round()
        for index, sequence in enumerate(self.waiting.in_turn()):
            if len(self.running) >= self._config.max_running:
                room = 0
            if not room and index >= self._config.max_running:
                if not self._residency.prefetch(sequence):
                    return
            elif not self._ready(sequence, now):
                continue
            elif room and self._start(sequence):
                room -= self._add_chunk(chunks, sequence, room)
            else:
                room = 0

    def _ready(self, sequence: Sequence, now: float) -> bool:
        if sequence.adapter_asked_at is None:
            sequence.adapter_asked_at = now
        ready = self._residency.ready(sequence)
        if ready and sequence.adapter_ready_at is None:
            sequence.adapter_ready_at = now
        return ready

    def _start(self, sequence: Sequence) -> bool:
        """Gives a ready sequence its blocks and its lease, one block being left for each of those
        that run already; False when there are too few.
        """
        self._residency.bind(sequence)  # the mode decides which prefixes it shares
        if not self._blocks.allocate(sequence, reserve=len(self.running)):
            return False
        self._residency.lease(sequence)
        self.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)
        if sequence.admitted_at is None:
            sequence.cached_tokens = sequence.computed
            self._observer.prefix_looked_up(tokens=sequence.prompt_len, hits=sequence.computed)
            fresh = sequence.prompt_len - sequence.computed
            self.waiting.fairness.served(sequence.fair_key, prompt=fresh)
        return True

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, room: int) -> int:
        """Adds as much of a prompt as there is room for; returns its rows."""
        count = min(sequence.remaining, self._config.max_chunk_tokens, room)
        if count:
            chunks.append(Chunk(sequence, sequence.computed, count))
        return count
