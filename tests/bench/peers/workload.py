"""Workload: the cells of the table, what each asks, and what adaplex is to reach in it."""

from __future__ import annotations

import random
from dataclasses import dataclass

SHORT = 64
"""Prompt and output tokens of a decode cell."""
LONG = 1024
"""Prompt tokens of a prefill cell."""
FIRST_TOKEN, LAST_TOKEN = 1000, 40000
"""Prompts are drawn from these: words in every vocabulary at hand, no control tokens."""


@dataclass(frozen=True)
class Cell:
    """Streams that begin together. `adapters` has an entry a stream: an index, or None for base."""

    name: str
    adapters: tuple[int | None, ...]
    prompt: int = SHORT
    output: int = SHORT

    @property
    def is_prefill(self) -> bool:
        """Whether prompt tokens are counted instead of output tokens."""
        return self.output == 1

    @property
    def counted(self) -> int:
        """The tokens of all streams that make its figure."""
        return len(self.adapters) * (self.prompt if self.is_prefill else self.output)

    def prompts(self, seed: int) -> list[list[int]]:
        """Random token ids, no prompt like another; the same for the same cell and seed."""
        dice = random.Random(f"{self.name} {seed}")
        return [
            [dice.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self.prompt)]
            for _ in self.adapters
        ]


CELLS = (
    Cell("1-base", (None,)),
    Cell("1-adapter", (0,)),
    Cell("8-base", (None,) * 8),
    Cell("8-distinct", tuple(range(8))),
    Cell("16-base", (None,) * 16),
    Cell("16-one", (0,) * 16),
    Cell("16-distinct", tuple(range(16))),
    Cell("prefill-base", (None,), LONG, 1),
    Cell("prefill-adapter", (0,), LONG, 1),
)
SLOTS = max(len(cell.adapters) for cell in CELLS)
CONTEXT = LONG + SHORT
"""Tokens that a slot holds: more than any stream has."""


@dataclass(frozen=True)
class Goal:
    """adaplex's figure in `cell` is to be `factor` times that of `peer` at least.

    `peer` is a system or a family of them: "llama.cpp" is the best of its file types.
    """

    cell: str
    peer: str
    factor: float


GOALS = (
    *(Goal(cell, "llama.cpp", 5) for cell in ("8-distinct", "16-distinct")),
    *(Goal(cell, "vllm", 8) for cell in ("8-distinct", "16-distinct")),
    *(Goal(cell, "peft", 8) for cell in ("8-distinct", "16-distinct")),
    Goal("1-adapter", "llama.cpp", 1.5),
    Goal("1-adapter", "vllm", 6),
    Goal("16-one", "llama.cpp", 1.2),
    Goal("16-base", "llama.cpp", 1.2),
    Goal("prefill-adapter", "llama.cpp", 1),
)
