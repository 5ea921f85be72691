"""Scheduler: chooses the tokens that the next step computes."""

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

SHORT_PROMPT = 128
"""Tokens of a prompt that is computed within a step or two."""
MAX_PROMPTS_SHARING = 4
"""Partly computed prompts beside which a new prompt gets a share of the step. Behind more, it gets
only what they leave, since each prompt has blocks for all its tokens."""


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank


def _by_adapter(chunks: list[Chunk]) -> list[Chunk]:
    return sorted(chunks, key=lambda chunk: chunk.sequence.adapter_key)


class PrefillTurn(NamedTuple):
    """A turn of a partly computed prompt, or of the waiting queue, to get rows of a step."""

    priority: int
    last: int
    """Number of the step in which it last got rows."""
    sequence: Sequence | None
    """None for the queue."""

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: highest priority first, then the least recent turn."""
        return -self.priority, self.last


class Scheduler:
    """Waiting sequences in a queue, and running ones sorted by urgency.

    A running sequence has blocks for all its known tokens and a lease on its adapter; a waiting one
    has neither. The most urgent running sequence always proceeds: it can preempt all others, and
    the cache has room for one sequence of any allowed length.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        residency: Residency,
        observer: Observer,
        prefill: PrefillPolicy,
    ) -> None:
        self._config = config
        self._prefill = prefill
        self._blocks = blocks
        self._residency = residency
        self._observer = observer
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self._step = 0
        self._last_start = 0
        """Number of the last step that started a waiting sequence."""

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind earlier ones of its priority and adapter."""
        sequence.status = Status.WAITING
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence; the caller frees its blocks and its lease."""
        queue = self.waiting if sequence.status is Status.WAITING else self.running
        queue.remove(sequence)
        sequence.status = Status.FINISHED

    def charge_output(self, sequence: Sequence) -> None:
        """Charges one generated token to the share of the sequence's adapter."""
        self.waiting.charge(sequence, output=1)

    def schedule(self, now: float) -> Batch:
        """Returns the batch of the next step: every decoding sequence, then prompts in turns.

        It is empty only if no sequence runs and every waiting one waits for its adapter.
        """
        self._step += 1
        decodes = self._decode()
        self._residency.begin_step(now)
        prompts: list[Chunk] = []
        budget = self._budget(len(decodes))
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

    def _budget(self, decodes: int) -> PrefillBudget:
        """Returns what prompts may add to a step of so many decoding rows. Prompts so short that
        they will decode a step or two from now count as rows.
        """
        if not decodes:
            return self._prefill.budget(0)
        places = max(0, self._config.max_running - len(self.running))
        begun = [sequence for sequence in self.running if not sequence.decoding]
        first = islice(self.waiting.in_order(), places)
        joining = sum(sequence.remaining <= SHORT_PROMPT for sequence in chain(begun, first))
        long = any(len(each) - each.cached_tokens > SHORT_PROMPT for each in begun)
        return self._prefill.budget(decodes, joining, short=joining > 0 and not long)

    def _decode(self) -> list[Chunk]:
        """Returns a row for each decoding sequence; preempts the least urgent if blocks run out."""
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
        """Returns a sequence to the queue, to be computed again; its tokens and mode stay."""
        self.remove(sequence)
        self._blocks.free(sequence)
        self._residency.release(sequence)
        self.add(sequence)
        self._observer.preempted()

    def _turns(self) -> list[PrefillTurn]:
        """Returns the turns of partly computed prompts, and of the queue if it shares with them."""
        turns = [
            PrefillTurn(s.request.priority, s.last_turn, s) for s in self.running if not s.decoding
        ]
        if self.waiting and len(turns) <= MAX_PROMPTS_SHARING:
            turns.insert(0, PrefillTurn(self.waiting.priority, self._last_start, None))
        return sorted(turns, key=lambda turn: turn.order)

    def _admit(self, chunks: list[Chunk], budget: PrefillBudget) -> None:
        """Starts waiting sequences in order while rows, places and blocks last.

        A sequence whose adapter is not in memory is skipped; one without blocks is not, so that
        long prompts get their turn. When no more can start, the adapters of the next few are still
        loaded, and those of more are fetched, so that they are in memory in time.
        """
        more = True
        for index, sequence in enumerate(self.waiting.in_order()):
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
        """Adds a chunk of a prompt, as long as the budget allows."""
        if count := budget.spend(sequence.computed, sequence.remaining):
            chunks.append(Chunk(sequence, sequence.computed, count))
            sequence.last_turn = self._step
