"""Request: one generation as the server passes it to the engine, tokenized and validated."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import RequestInvalid


class AdapterMode(StrEnum):
    """Ways to apply an adapter to the base weights."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"


GREEDY_BELOW = 1e-5
"""Temperature below which sampling is greedy."""
SHOWN_TOKENS = 16
"""Tokens of an invocation that an error message shows at most."""


class FinishReason(StrEnum):
    """Why a sequence ended without an error."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings. The server checks the ranges (see generation.proto)."""

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
    """Number of likeliest tokens to report beside the chosen one; None reports no logprobs."""

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always chosen: no other has a chance at so low a
        temperature, and dividing by it would overflow.
        """
        return self.temperature < GREEDY_BELOW

    @cached_property
    def plain(self) -> bool:
        """True if the result is the likeliest token of the unchanged logits, and nothing else."""
        masks_stops = self.min_tokens > 0
        return self.greedy and not self.penalized and not masks_stops and self.logprobs is None

    @property
    def penalized(self) -> bool:
        """True if any penalty changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class AdapterRef:
    """The adapter content that a request is bound to. `digest` is its identity."""

    name: str
    version: int
    digest: str
    packed_bytes: int
    traits: AdapterTraits
    mode: AdapterMode = AdapterMode.UNMERGED
    """Never AUTO once the engine has admitted the request."""

    def __post_init__(self) -> None:
        """Asserts that no adapter has both an invocation and positions before the prompt."""
        assert not (self.traits.leading and self.traits.invocation)

    @classmethod
    def of(
        cls,
        record: AdapterRecord,
        mode: AdapterMode | None = None,
        *,
        default: AdapterMode = AdapterMode.UNMERGED,
    ) -> AdapterRef:
        """Returns a reference to a catalog record. Without `mode`, an adapter that can only be
        merged is served merged, and any other in the mode `default`.

        Raises RequestInvalid, naming `spec.mode`, for UNMERGED if merging is the only way.
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
        """Key of its keys and values: merged and unmerged weights round differently."""
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
        """Position of the prompt from which the adapter is applied: 0, or where its invocation last
        begins; None if the prompt does not contain it.
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
"""Replaces the token of a row whose logits are not finite."""


@dataclass(frozen=True)
class SampledToken:
    """The runner's result for one sequence of a step."""

    token: int
    """A token id, or OVERFLOWED."""
    logprob: Logprob | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds from arrival to events, and reused tokens; 0 for events that have not happened."""

    queued: float = 0.0
    adapter_wait: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class StepOutput:
    """The output of one step for one request. The last one has `finish` or `error` set."""

    request_id: str
    admitted: bool = False
    """True on the first output: the adapter is in memory, its mode is decided."""
    adapter: AdapterRef | None = None
    """The applied adapter, on the first output; None for the base."""
    tokens: tuple[int, ...] = ()
    at: float = 0.0
    """End of the step, in `time.monotonic()` seconds."""
    logprobs: tuple[Logprob, ...] = ()
    finish: FinishReason | None = None
    """Why the engine ended the request; stop strings are found later, by the server's Response."""
    error: Exception | None = None
    timing: Timing | None = None
    """Set on the first output, with the events until then, and on the last."""

    @property
    def last(self) -> bool:
        """True if the request has ended."""
        return self.finish is not None or self.error is not None
