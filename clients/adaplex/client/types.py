"""What goes into a call and what comes out of it: frozen values, no protobuf.

Field names are those of protos/adaplex/v1. An enum-typed field is None when the server sent a
value that this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypedDict

from adaplex.client.adapter_types import (
    Adapter as Adapter,
)
from adaplex.client.adapter_types import (
    AdapterDetails as AdapterDetails,
)
from adaplex.client.adapter_types import (
    AdapterEvent as AdapterEvent,
)
from adaplex.client.adapter_types import (
    AdapterReport as AdapterReport,
)
from adaplex.client.adapter_types import (
    AdapterVersion as AdapterVersion,
)
from adaplex.client.adapter_types import (
    AliasTarget as AliasTarget,
)
from adaplex.client.adapter_types import (
    MergeOptions as MergeOptions,
)
from adaplex.client.adapter_types import (
    ModuleReport as ModuleReport,
)
from adaplex.client.adapter_types import (
    Refusal as Refusal,
)
from adaplex.client.adapter_types import (
    ResidencyTier as ResidencyTier,
)
from adaplex.client.adapter_types import (
    UploadResult as UploadResult,
)
from adaplex.client.adapter_types import (
    Validation as Validation,
)
from adaplex.client.adapter_types import (
    Weighted as Weighted,
)


class AdapterMode(StrEnum):
    """How an adapter meets the base weights."""

    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"


class FinishReason(StrEnum):
    """Why an answer ended: a stop token or string, or its greatest length."""

    STOP = "stop"
    LENGTH = "length"


class Health(StrEnum):
    """What the server says of its own readiness."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


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


# The server.


@dataclass(frozen=True)
class AdaptableModule:
    """A module of the base that an adapter may change. `kind` is `linear` or `norm`."""

    name: str
    kind: str
    in_features: int
    out_features: int
    is_head: bool


@dataclass(frozen=True)
class BaseModelInfo:
    """The resident base model. A decode step reads `step_weight_bytes` of its `weight_bytes`;
    `group_size` inputs share a scale where it is kept as `int4-group`, else it is 0.
    """

    name: str
    architecture: str
    quantization: str
    group_size: int
    compute_dtype: str
    device: str
    digest: str
    fingerprint: str
    weight_bytes: int
    step_weight_bytes: int
    kv_token_bytes: int
    max_model_len: int
    vocab_size: int
    modules: tuple[AdaptableModule, ...]


@dataclass(frozen=True)
class Capacity:
    """How full the server is."""

    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_block_tokens: int
    arena_bytes_total: int
    arena_bytes_used: int
    adapters_stored: int
    adapters_resident: int
    merged_bytes_total: int
    merged_bytes_used: int
    host_bytes_total: int
    host_bytes_used: int
    store_bytes_total: int
    store_bytes_used: int
    pinned_bytes_total: int
    pinned_bytes_used: int


@dataclass(frozen=True)
class Limits:
    """What the server accepts."""

    max_concurrent_sequences: int
    max_waiting_requests: int
    max_adapter_bytes: int
    max_adapter_rank: int
    max_chunk_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """What the server is and how full it is."""

    version: str
    model: BaseModelInfo
    capacity: Capacity
    limits: Limits
    uptime_seconds: float
