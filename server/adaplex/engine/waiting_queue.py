"""WaitingQueue: sequences that wait, in the order in which they should start."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from adaplex.engine.fairness import PROMPT_WEIGHT, VirtualTokenCounter
from adaplex.engine.sequence import Sequence


def _arrival(sequence: Sequence) -> tuple[float, int]:
    return sequence.request.arrival, sequence.number


class WaitingQueue:
    """First the most urgent priority, in it the adapter that was served least, in it who came
    first.
    """

    def __init__(self) -> None:
        self._fairness = VirtualTokenCounter()
        self._lines: dict[tuple[int, str], list[Sequence]] = {}
        """By priority and adapter, each by arrival."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no order that means anything."""
        for line in self._lines.values():
            yield from line

    @property
    def priority(self) -> int:
        """Of the most urgent of them; there must be one."""
        return max(priority for priority, _ in self._lines)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its line that came before it."""
        insort(self._lines.setdefault(_line(sequence), []), sequence, key=_arrival)
        self._size += 1
        self._fairness.joined(sequence.fair_key)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        line = self._lines[_line(sequence)]
        line.remove(sequence)
        if not line:
            del self._lines[_line(sequence)]
        self._size -= 1
        self._fairness.left(sequence.fair_key)

    def charge(self, sequence: Sequence, *, prompt: int = 0, output: int = 0) -> None:
        """Charges tokens that were computed for a sequence to its adapter's share."""
        self._fairness.served(sequence.fair_key, prompt=prompt, output=output)

    def in_turn(self) -> Iterator[Sequence]:
        """All of them, as they should start. What was yielded last may be removed meanwhile.

        One that is passed over counts as if it had started: those behind it of its adapter come
        no earlier for it.
        """
        turns = [
            (-priority, self._fairness.counter(key), _arrival(line[0]), priority, key, 0)
            for (priority, key), line in self._lines.items()
        ]
        heapq.heapify(turns)
        while turns:
            rank, counter, _, priority, key, index = heapq.heappop(turns)
            sequence = self._lines[priority, key][index]
            yield sequence
            line = self._lines.get((priority, key), [])
            if index < len(line) and line[index] is sequence:
                index += 1
            if index < len(line):
                counter += PROMPT_WEIGHT * sequence.prompt_len
                heapq.heappush(turns, (rank, counter, _arrival(line[index]), priority, key, index))


def _line(sequence: Sequence) -> tuple[int, str]:
    return sequence.request.priority, sequence.fair_key
