"""StopStrings: finds stop strings in the text and the special tokens of a response."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

FIRST_MARK = 0xD800
"""First of the surrogates, which no decoded text has: each marks one special token."""
MAX_MARKS = 0x800
NO_SPECIAL: Mapping[int, str] = MappingProxyType({})


class StopStrings:
    """Finds the first complete stop string in a text that arrives in pieces of any size.

    Special tokens are not text. One that a stop string spells out is pushed as its mark, a single
    character: it completes that stop string, and never appears in the text that is returned.
    """

    def __init__(self, stops: Sequence[str], special: Mapping[int, str] = NO_SPECIAL) -> None:
        """`special`: the spelling of each special token, by id."""
        spelled = {
            token: content
            for token, content in special.items()
            if any(content in stop for stop in stops)
        }
        self.marks: dict[int, str] = {
            token: chr(FIRST_MARK + n) for n, token in zip(range(MAX_MARKS), spelled, strict=False)
        }
        """Mark of each special token that a stop string spells out, by id."""
        marks = {spelled[token]: mark for token, mark in self.marks.items()}
        self._stops = {stop: stop for stop in stops}
        """The stop string of each string to find: itself, and itself with marks."""
        self._stops |= {_marked(stop, marks): stop for stop in stops}
        self._unmarked = dict.fromkeys(map(ord, marks.values()))
        self._pending = ""
        """Text that may be the beginning of a stop string."""
        self.found: str | None = None
        """The stop string that was found."""

    def push(self, text: str, *, matching: bool = True) -> str:
        """Adds text. Returns the text that no stop string can contain.

        A stop string that is completed by text pushed with `matching=False` counts as text.
        """
        before = len(self._pending)
        text = self._pending + text
        ends = [
            (at + len(s), at, s)
            for s in self._stops
            if (at := text.find(s, max(0, before - len(s) + 1))) >= 0
        ]
        if ends and matching:
            _, at, found = min(ends)
            self.found = self._stops[found]
            self._pending = ""
            return self._shown(text[:at])
        pending = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - pending :]
        return self._shown(text[: len(text) - pending])

    def flush(self) -> str:
        """Returns the pending text, which no stop string completed."""
        pending, self._pending = self._pending, ""
        return self._shown(pending)

    def _shown(self, text: str) -> str:
        return text.translate(self._unmarked) if self._unmarked else text


def _marked(stop: str, marks: Mapping[str, str]) -> str:
    """Returns a stop string with the mark of each special token in the place of its spelling."""
    if not marks:
        return stop
    longest_first = sorted(marks, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda m: marks[m.group()], stop)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
