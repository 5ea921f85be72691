"""Sequence: a request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from adaplex.engine.request import AdapterMode, AdapterRef, Request, Timing

VIRTUAL = 1 << 32
"""VIRTUAL + i represents position i of those that an adapter puts before the prompt; token ids of
vocabularies are smaller."""


class Status(Enum):
    """States of a sequence."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, blocks and progress of one request."""

    request: Request
    number: int = 0
    """Order of arrival at the engine."""
    tokens: list[int] = field(init=False)
    """Leading positions of the adapter, then prompt, then output."""
    leading: int = field(init=False)
    """Positions that the adapter puts before the prompt."""
    prompt_len: int = field(init=False)
    """Tokens of the prompt."""
    adapter_from: int = field(init=False)
    """The first position that the adapter changes; rows before it are those of the base."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Block table: block i holds tokens [i * block_tokens, (i + 1) * block_tokens)."""
    hashes: list[bytes] = field(default_factory=list)
    """Hashes of its full blocks that are published to the prefix cache."""
    status: Status = Status.WAITING
    cached_tokens: int = 0
    """Tokens of the prompt found in the prefix cache at its first start."""
    bypassed: int = 0
    """Later sequences that leased an adapter while this waited for room for its own."""
    last_turn: int = 0
    """Number of the last step that computed some of its prompt."""
    adapter_requested_at: float | None = None
    """Time of the first lookup of its adapter; all times in `time.monotonic()` seconds."""
    adapter_ready_at: float | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        """Derives the token list; the prompt must contain the adapter's invocation."""
        self.leading, self.prompt_len = self.request.leading, len(self.request.prompt)
        self.tokens = [*range(VIRTUAL, VIRTUAL + self.leading), *self.request.prompt]
        invoked = self.request.invoked_at
        assert invoked is not None
        self.adapter_from = invoked

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts sequences by urgency: priority, then arrival."""
        return (-self.request.priority, self.request.arrival, self.number)

    @property
    def adapter(self) -> AdapterRef | None:
        """The content the request is bound to, None for the base."""
        return self.request.adapter

    @property
    def adapter_key(self) -> str:
        """Key that groups rows and separates prefixes in the cache; empty for the base."""
        return self.request.adapter.key if self.request.adapter else ""

    @property
    def fair_key(self) -> str:
        """Key of the share of the engine that it uses: its adapter's name; empty for the base."""
        return self.request.adapter.name if self.request.adapter else ""

    @property
    def output_len(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.leading - self.prompt_len

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.leading + self.prompt_len :]

    def bind(self, mode: AdapterMode) -> None:
        """Sets the mode of the adapter for good."""
        assert self.adapter is not None
        self.request = replace(self.request, adapter=replace(self.adapter, mode=mode))

    def timing(self, now: float) -> Timing:
        """Returns seconds from arrival to each event, 0 for an event that has not happened."""
        arrival = self.request.arrival
        requested, ready = self.adapter_requested_at, self.adapter_ready_at
        return Timing(
            queued=(self.admitted_at or arrival) - arrival,
            adapter_wait=ready - requested if ready is not None and requested is not None else 0.0,
            first_token=(self.first_token_at or arrival) - arrival,
            total=now - arrival,
            cached_tokens=self.cached_tokens,
        )

    @property
    def remaining(self) -> int:
        """Number of tokens known and not yet computed: 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """True if all but the newest generated token is computed."""
        return self.remaining == 1 and self.output_len > 0
