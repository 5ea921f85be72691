"""Request: what the edge asks of the engine, already checked and tokenized."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import RequestInvalid


class AdapterMode(StrEnum):
    """How an adapter meets the base weights."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"


GREEDY_BELOW = 1e-5
"""Temperature."""
SHOWN_TOKENS = 16
"""Tokens of an invocation that an error message shows at most."""


class FinishReason(StrEnum):
    """Why a sequence ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked at the edge (see generation.proto)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """End-of-sequence tokens included, unless the request ignores them."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the chosen one; None reports nothing."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken: no other has a chance at so low a
        temperature, and dividing by it would overflow.
        """
        return self.temperature < GREEDY_BELOW

    @cached_property
    def plain(self) -> bool:
        """Whether nothing but the likeliest token is wanted."""
        held_back = self.min_tokens > 0
        return self.greedy and not self.penalized and not held_back and self.logprobs is None

    @property
    def penalized(self) -> bool:
        """Whether any penalty changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class AdapterRef:
    """The content a request is bound to at admission. `digest` is the identity."""

    name: str
    version: int
    digest: str
    packed_bytes: int
    traits: AdapterTraits
    mode: AdapterMode = AdapterMode.UNMERGED
    """Never AUTO once the engine has admitted the request."""

    def __post_init__(self) -> None:
        """Asserts that nothing that is invoked has positions of its own before the prompt."""
        assert not (self.traits.leading and self.traits.invocation)

    @classmethod
    def of(
        cls,
        record: AdapterRecord,
        mode: AdapterMode | None = None,
        *,
        default: AdapterMode = AdapterMode.UNMERGED,
    ) -> AdapterRef:
        """Binds a request to a record. Without `mode`, an adapter that can only be merged is
        merged, and any other is served as `default` says.

        Raises RequestInvalid, naming `spec.mode`, for UNMERGED where merging is the only way.
        """
        if record.traits.merged_only:
            if mode is AdapterMode.UNMERGED:
                reason = f"adapter {record.name} can only be served merged"
                raise RequestInvalid("spec.mode", reason)
            mode = AdapterMode.MERGED
        return cls(
            name=record.name,
            version=record.version,
            digest=record.digest,
            packed_bytes=record.packed_bytes,
            traits=record.traits,
            mode=mode or default,
        )

    @cached_property
    def key(self) -> str:
        """What distinguishes its KV: merged and unmerged weights round differently."""
        return f"{self.digest}/{self.mode}"


@dataclass(frozen=True)
class Request:
    """One generation. Times are `time.monotonic()` seconds."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    cache_salt: str = ""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None

    @property
    def leading(self) -> int:
        """Positions that the adapter puts before the prompt; they count towards the context."""
        return self.adapter.traits.leading if self.adapter else 0

    @property
    def invoked_at(self) -> int | None:
        """The position from which on the adapter is applied: 0, or where its invocation last begins
        in the prompt; None when it does not.
        """
        tokens = self.adapter.traits.invocation if self.adapter else ()
        last = len(self.prompt) - len(tokens)
        starts = range(last, -1, -1) if tokens else (0,)
        return next((i for i in starts if self.prompt[i : i + len(tokens)] == tokens), None)

    def check(self, config: EngineConfig) -> None:
        """Raises RequestInvalid if an engine with these limits can never serve the request."""
        tokens, leading, adapter = len(self.prompt), self.leading, self.adapter
        if not tokens:
            raise RequestInvalid("prompt", "is empty")
        if leading + tokens >= config.max_model_len:
            before = (
                f" behind the {leading} of adapter {adapter.name}" if adapter and leading else ""
            )
            reason = f"has {tokens} tokens{before}; with one to generate, the limit is "
            raise RequestInvalid("prompt", f"{reason}{config.max_model_len}")
        if adapter and self.invoked_at is None:
            shown = ", ".join(map(str, adapter.traits.invocation[:SHOWN_TOKENS]))
            more = ", ..." if len(adapter.traits.invocation) > SHOWN_TOKENS else ""
            reason = (
                f"does not have the tokens {shown}{more}, which adapter {adapter.name} begins at"
            )
            raise RequestInvalid("prompt", reason)
        if self.sampling.max_tokens < 1:
            raise RequestInvalid("max_tokens", "must be at least 1")


@dataclass(frozen=True)
class Logprob:
    """Log probability of a chosen token and of the likeliest ones, before penalties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


OVERFLOWED = -1
"""In place of a token: the logits of this row are not finite."""


@dataclass(frozen=True)
class SampledToken:
    """What the runner says of one sequence after a step."""

    token: int
    """A token id, or OVERFLOWED."""
    logprob: Logprob | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds from arrival, and what was reused; filled as the request goes on."""

    queued: float = 0.0
    adapter_wait: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class StepOutput:
    """What one step gave one request. The last one has `finish` or `error` set."""

    request_id: str
    admitted: bool = False
    """Set on the first output: the adapter is in memory, its mode is decided."""
    adapter: AdapterRef | None = None
    """What is applied, on the first output; None is the base."""
    tokens: tuple[int, ...] = ()
    at: float = 0.0
    """When the step had them, as `time.monotonic()` tells it."""
    logprobs: tuple[Logprob, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = None
    timing: Timing | None = None
    """Set on the first output, as far as it is known, and on the last."""

    @property
    def last(self) -> bool:
        """Whether the request has ended."""
        return self.finish is not None or self.error is not None
