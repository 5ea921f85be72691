"""Scheduler: which tokens the next step computes."""

from __future__ import annotations

from bisect import insort
from itertools import chain, islice
from typing import NamedTuple

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.block_manager import BlockManager
from adaplex.engine.config import EngineConfig
from adaplex.engine.observer import Observer
from adaplex.engine.prefill_budget import PrefillBudget, PrefillPolicy
from adaplex.engine.residency import Admission, Residency
from adaplex.engine.sequence import Sequence, Status
from adaplex.engine.waiting_queue import WaitingQueue

SHORT = 128
"""Tokens of a prompt that is computed within a step or two."""
MAX_SHARING = 4
"""Prompts under way beside which a new one gets a share of the step; behind more, it waits for what
they leave: each prompt holds blocks for all its tokens."""


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank


def _by_adapter(chunks: list[Chunk]) -> list[Chunk]:
    return sorted(chunks, key=lambda chunk: chunk.sequence.adapter_key)


class PrefillTurn(NamedTuple):
    """Of a prompt under way, or of the queue, to take rows of a step."""

    priority: int
    last: int
    """The step in which it last took some."""
    sequence: Sequence | None
    """None for the queue."""

    @property
    def order(self) -> tuple[int, int]:
        """The most urgent first, then who had a turn longest ago."""
        return -self.priority, self.last


class Scheduler:
    """Waiting sequences, in turn, and running ones, most urgent first.

    A running sequence holds blocks for all its known tokens and a lease on its adapter; a waiting
    one holds nothing. The most urgent running sequence always goes on: it can take the blocks of
    all others, and the cache holds a sequence of any allowed length.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        residency: Residency,
        observer: Observer,
        pace: PrefillPolicy,
    ) -> None:
        self._config = config
        self._pace = pace
        self._blocks = blocks
        self._residency = residency
        self._observer = observer
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self._step = 0
        self._last_start = 0
        """The last step that started a waiting sequence."""

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its priority and adapter that came before it."""
        sequence.status = Status.WAITING
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence; its blocks and lease are the caller's to free."""
        queue = self.waiting if sequence.status is Status.WAITING else self.running
        queue.remove(sequence)
        sequence.status = Status.FINISHED

    def charge_output(self, sequence: Sequence) -> None:
        """Charges one generated token to the share of the sequence's adapter."""
        self.waiting.charge(sequence, output=1)

    def schedule(self, now: float) -> Batch:
        """The next step: every decoding sequence, and prompts, under way and new, in turn.

        Empty only if every waiting sequence waits for its adapter.
        """
        self._step += 1
        decodes = self._decode()
        self._residency.begin_step(now)
        prompts: list[Chunk] = []
        budget = self._pace.budget(len(decodes), self._joining() if decodes else 0)
        turns = self._turns()
        for index, turn in enumerate(turns):
            equals = sum(other.priority == turn.priority for other in turns[index:])
            if turn.sequence is None:
                self._admit(prompts, budget.split(equals))
            else:
                self._add_chunk(prompts, turn.sequence, budget.split(equals))
        if all(turn.sequence for turn in turns):
            self._admit(prompts, budget)
        return Batch((*_by_adapter(decodes), *_by_adapter(prompts)))

    def _joining(self) -> int:
        """Sequences whose prompts are so short that they will decode a step or two from now."""
        places = max(0, self._config.max_running - len(self.running))
        prompts = (sequence for sequence in self.running if not sequence.decoding)
        return sum(
            sequence.remaining <= SHORT
            for sequence in chain(prompts, islice(self.waiting.in_turn(), places))
        )

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

    def _turns(self) -> list[PrefillTurn]:
        """Of the prompts under way, and of the queue if it shares with them, in order."""
        turns = [
            PrefillTurn(s.request.priority, s.last_turn, s) for s in self.running if not s.decoding
        ]
        if self.waiting and len(turns) <= MAX_SHARING:
            turns.insert(0, PrefillTurn(self.waiting.priority, self._last_start, None))
        return sorted(turns, key=lambda turn: turn.order)

    def _admit(self, chunks: list[Chunk], budget: PrefillBudget) -> None:
        """Starts waiting sequences in turn while rows, places and blocks last.

        One whose adapter is not there is passed over; one that finds no blocks is not, so that
        long prompts get their turn. When nothing more can start, the next few are still asked
        for, and adapters of more are fetched, so that they are there in time.
        """
        more = True
        for index, sequence in enumerate(self.waiting.in_turn()):
            more = more and budget.open and len(self.running) < self._config.max_running
            if more:
                admission = self._residency.try_admit(sequence, self._allocate)
                more = admission is not Admission.NO_BLOCKS
                if admission is Admission.ADMITTED:
                    self._start(sequence)
                    self._add_chunk(chunks, sequence, budget)
            elif index < self._config.max_running:
                self._residency.load(sequence)
            elif not self._residency.prefetch(sequence):
                return

    def _allocate(self, sequence: Sequence) -> bool:
        """Allocates the blocks of a sequence that starts; returns False if fewer than one for each
        running sequence would be left.
        """
        return self._blocks.allocate(sequence, reserve=len(self.running))

    def _start(self, sequence: Sequence) -> None:
        """Moves an admitted sequence from the queue to the running ones."""
        self.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)
        self._last_start = self._step
        if sequence.admitted_at is None:
            cached = sequence.cached_tokens = max(0, sequence.computed - sequence.leading)
            self._observer.prefix_looked_up(tokens=sequence.prompt_len, hits=cached)
            self.waiting.charge(sequence, prompt=sequence.prompt_len - cached)

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: PrefillBudget) -> None:
        """Adds as much of a prompt as the budget has room for."""
        if count := budget.take(sequence.computed, sequence.remaining):
            chunks.append(Chunk(sequence, sequence.computed, count))
            sequence.last_turn = self._step
