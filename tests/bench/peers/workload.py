"""Workload: the cells of the table, their requests, and adaplex's goals."""

from __future__ import annotations

import random
from dataclasses import dataclass

SHORT = 64
"""Prompt and output tokens of a decode cell."""
LONG = 1024
"""Prompt tokens of a prefill cell."""
FIRST_TOKEN, LAST_TOKEN = 1000, 40000
"""Range of the prompts' token ids: words in all the vocabularies used, no control tokens."""


@dataclass(frozen=True)
class Cell:
    """Streams that start together, each with the adapter of an index, or None for the base."""

    name: str
    adapters: tuple[int | None, ...]
    prompt: int = SHORT
    output: int = SHORT

    @property
    def is_prefill(self) -> bool:
        """True if its figure counts prompt tokens instead of output tokens."""
        return self.output == 1

    @property
    def counted(self) -> int:
        """Number of tokens of all streams that its figure counts."""
        return len(self.adapters) * (self.prompt if self.is_prefill else self.output)

    def prompts(self, seed: int) -> list[list[int]]:
        """Returns random token ids, without a repeated prompt; the same for one cell and seed."""
        rng = random.Random(f"{self.name} {seed}")
        return [
            [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self.prompt)]
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
"""Tokens of a slot, enough for the longest stream."""


@dataclass(frozen=True)
class Goal:
    """adaplex's figure in `cell` should be at least `factor` times that of `peer`.

    `peer` is a system or a family of them: "llama.cpp" is the better of its file types.
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
