"""What goes into a generation and what comes out of it: frozen values, no protobuf.

Field names are those of generation.proto. An enum-typed field is None when the server sent a value
that this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypedDict

from adaplex.client.adapter_types import Weighted


class AdapterMode(StrEnum):
    """How an adapter meets the base weights."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"


class FinishReason(StrEnum):
    """Why an answer ended: a stop token or string, or its greatest length."""

    STOP = "stop"
    LENGTH = "length"


# What goes in.


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation. `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]
"""Plain text, token ids, or chat messages (mappings have `role` and `content`)."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. None leaves a choice to the server; ranges are in generation.proto."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    """Report this many likeliest tokens beside each chosen one; None reports nothing."""


class SamplingFields(TypedDict, total=False):
    """The fields of SamplingParams as keywords; they override those of `sampling`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    logprobs: int | None


class GenerateOptions(SamplingFields, total=False):
    """The keywords of `generate` and `stream`.

    `adapter` is `name`, `name@version`, `name@alias` or `sha256:<hex>`; None asks the base model.
    `adapters` are several of them with their weights, whose deltas are added. `routing_key` keeps
    requests on one side of a weighted alias. `timeout` is in seconds, None takes the client's.
    Prefix caches are shared only within one `cache_salt`. Larger `priority` goes first.
    `request_id` is drawn when it is None.
    """

    adapter: str | None
    adapters: Weighted | None
    routing_key: str
    mode: AdapterMode | str | None
    sampling: SamplingParams | None
    timeout: float | None
    cache_salt: str
    priority: int
    request_id: str | None


# What comes out of a generation.


@dataclass(frozen=True)
class AppliedComponent:
    """One adapter of a combination."""

    name: str
    version: int
    digest: str
    weight: float
    alias: str


@dataclass(frozen=True)
class AppliedAdapter:
    """Proof of what answered: this content changed this many modules of the base.

    `alias` is what chose the version, if an alias did; `components` what was combined; `warnings`
    why the answer may not be what the adapter's author meant.
    """

    name: str
    version: int
    digest: str
    mode: AdapterMode | None
    modules: int
    alias: str = ""
    components: tuple[AppliedComponent, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TopLogprob:
    """A likely token and its log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log probability and the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds as the server measured them, from the request's arrival."""

    queue_seconds: float
    adapter_wait_seconds: float
    first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Started:
    """First event of a stream: what answers. It carries no text of its own."""

    request_id: str
    model: str
    adapter: AppliedAdapter | None
    prompt_tokens: int
    text: ClassVar[str] = ""


@dataclass(frozen=True)
class Delta:
    """New text and the tokens behind it; `text` may be empty, and is never half a character."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Last event of a stream: why it ended and what it took. It carries no text of its own."""

    finish_reason: FinishReason | None
    stop: str
    usage: Usage
    timing: Timing
    text: ClassVar[str] = ""


GenerationEvent = Started | Delta | Finished


@dataclass(frozen=True)
class Generation:
    """A whole answer. `adapter` is None when the base model answered."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    adapter: AppliedAdapter | None
    finish_reason: FinishReason | None
    stop: str
    """The stop string or decimal stop token that ended the answer, or empty."""
    usage: Usage
    timing: Timing
    request_id: str
    model: str

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens over the request's whole time in the server, waiting included."""
        seconds = self.timing.total_seconds
        return self.usage.completion_tokens / seconds if seconds > 0 else 0.0
