"""WaitingQueue: waiting sequences, in the order in which they should start."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from adaplex.engine.fairness import PROMPT_WEIGHT, VirtualTokenCounter
from adaplex.engine.sequence import Sequence


def _arrival(sequence: Sequence) -> tuple[float, int]:
    return sequence.request.arrival, sequence.number


class WaitingQueue:
    """Orders sequences by priority, then by the adapter that was served least, then by arrival."""

    def __init__(self) -> None:
        self._fairness = VirtualTokenCounter()
        self._lines: dict[tuple[int, str], list[Sequence]] = {}
        """Sequences by priority and adapter, each line by arrival."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """Yields all waiting sequences, unordered."""
        for line in self._lines.values():
            yield from line

    @property
    def priority(self) -> int:
        """The highest priority in the queue, which must not be empty."""
        return max(priority for priority, _ in self._lines)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind earlier ones of its priority and adapter."""
        insort(self._lines.setdefault(_line(sequence), []), sequence, key=_arrival)
        self._size += 1
        self._fairness.add_waiting(sequence.fair_key)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence from anywhere in the queue."""
        line = self._lines[_line(sequence)]
        line.remove(sequence)
        if not line:
            del self._lines[_line(sequence)]
        self._size -= 1
        self._fairness.remove_waiting(sequence.fair_key)

    def charge(self, sequence: Sequence, *, prompt: int = 0, output: int = 0) -> None:
        """Charges tokens computed for a sequence, waiting or not, to its adapter."""
        self._fairness.charge(sequence.fair_key, prompt=prompt, output=output)

    def in_order(self) -> Iterator[Sequence]:
        """Yields all sequences in the order in which they should start. The sequence yielded last
        may be removed meanwhile.

        A sequence that is skipped counts as if it had started: it does not advance the later ones
        of its adapter.
        """
        heads = [
            (-priority, self._fairness.counter(key), _arrival(line[0]), priority, key, 0)
            for (priority, key), line in self._lines.items()
        ]
        heapq.heapify(heads)
        while heads:
            rank, counter, _, priority, key, index = heapq.heappop(heads)
            sequence = self._lines[priority, key][index]
            yield sequence
            line = self._lines.get((priority, key), [])
            if index < len(line) and line[index] is sequence:
                index += 1
            if index < len(line):
                counter += PROMPT_WEIGHT * sequence.prompt_len
                heapq.heappush(heads, (rank, counter, _arrival(line[index]), priority, key, index))


def _line(sequence: Sequence) -> tuple[int, str]:
    return sequence.request.priority, sequence.fair_key
