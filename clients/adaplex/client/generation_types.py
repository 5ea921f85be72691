"""The arguments and results of a generation: frozen dataclasses without protobuf.

Field names are those of generation.proto. An enum field is None if the server sent a value that
this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypedDict

from adaplex.client.adapter_types import Weighted


class AdapterMode(StrEnum):
    """How an adapter is applied: beside the base's weights, folded into a dense copy of them, or as
    the server chooses for each request.
    """

    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"


class FinishReason(StrEnum):
    """Why an answer ended: STOP for an end-of-sequence token, a stop token or a stop string, LENGTH
    for `max_tokens` or the context length.
    """

    STOP = "stop"
    LENGTH = "length"


# Arguments.


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation.

    `role` is one that the model's chat template renders: `system`, `user`, `assistant`, often
    `tool`.
    """

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]
"""Plain text, token ids, or chat messages; a mapping has `role` and `content`."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. None selects the server's default.

    `temperature`: 0 to 10, default 0; below 1e-5 is greedy.
    `top_k`: sample from this many likeliest tokens; 0 is all.
    `top_p`: sample from the likeliest tokens of this total probability, (0, 1], default 1.
    `min_p`: drop tokens less likely than this times the likeliest, [0, 1], default 0.
    `repetition_penalty`: over prompt and output, (0, 10], default 1.
    `presence_penalty`, `frequency_penalty`: over the output, [-2, 2], default 0.
    `seed`: the same seed gives the same output in the same mode; by default random.
    `max_tokens`: greatest length of the answer, default 128, bounded by the context length.
    `min_tokens`: end-of-sequence and stop tokens are suppressed before this many, default 0.
    `stop`: at most 16 strings of at most 256 characters; the answer ends before the first found, be
    it text or, as `<|im_end|>`, a special token.
    `stop_token_ids`: at most 64 tokens that end the answer.
    `ignore_eos`: True does not end the answer at an end-of-sequence token.
    `logprobs`: report this many likeliest tokens beside each chosen one, 0 to 20; None reports
    nothing.
    """

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


class SamplingFields(TypedDict, total=False):
    """The fields of SamplingParams as keywords; they override the fields of `sampling`."""

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
    """The keywords of `generate` and `stream`. None selects the default.

    `adapter`: `name`, `name@version`, `name@alias` or `sha256:<64 hex digits>`; by default the base
    model alone. A bare name follows its alias `default`, and without one its newest version.
    `adapters`: a mix of at most 8 adapters whose weighted deltas are added, by selector and weight
    (-10 to 10); not together with `adapter`.
    `routing_key`: requests of one key get the same version of a weighted alias; at most 256
    characters, by default each request draws one.
    `mode`: how the adapter is applied; by default the server's mode.
    `sampling`: how to choose tokens; SamplingParams describes its fields.
    `timeout`: seconds of the call; by default the client's.
    `cache_salt`: requests share cached prompt prefixes only within one salt, such as a tenant's.
    `priority`: -100 to 100, default 0; larger is scheduled first.
    `request_id`: printable ASCII; by default a random UUID.
    `add_special_tokens`: whether the tokenizer adds its special tokens, such as BOS, to a text; by
    default it does, unless the text starts with them.
    `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`, `seed`, `max_tokens`, `min_tokens`, `stop`, `stop_token_ids`, `ignore_eos`,
    `logprobs`: fields of SamplingParams; they override the fields of `sampling`.
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
    add_special_tokens: bool | None


# Results.


@dataclass(frozen=True)
class AppliedComponent:
    """One adapter of a mix. `alias` is the alias that chose its version, if one did."""

    name: str
    version: int
    digest: str
    weight: float
    alias: str


@dataclass(frozen=True)
class AppliedAdapter:
    """The adapter that answered.

    `digest` is `sha256:<64 hex digits>` of its content, `modules` the number of modules of the base
    that it changed. `alias` is the alias that chose the version, if one did. `components` are the
    adapters of a mix. `warnings` say why the answer may not be what the adapter's author meant.
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
    """One of the likeliest tokens and its log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log probability and the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one request. The prefix cache had `cached_tokens` of the prompt's tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds that the server measured: waiting in the queue, waiting for the adapter, and from the
    request's arrival to its first token and to its end.
    """

    queue_seconds: float
    adapter_wait_seconds: float
    first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Started:
    """First event of a stream: the model and the adapter that answer. `text` is always empty.

    `warnings` say why the encoded prompt may not be the one that the caller meant.
    """

    request_id: str
    model: str
    adapter: AppliedAdapter | None
    prompt_tokens: int
    warnings: tuple[str, ...] = ()
    text: ClassVar[str] = ""


@dataclass(frozen=True)
class Delta:
    """New text and its tokens. `text` may be empty, and never ends within a character."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Last event of a stream: why it ended, its usage and timing. `text` is always empty.

    `stop` is the stop string or decimal stop token that ended the answer, or empty.
    """

    finish_reason: FinishReason | None
    stop: str
    usage: Usage
    timing: Timing
    text: ClassVar[str] = ""


GenerationEvent = Started | Delta | Finished


@dataclass(frozen=True)
class Generation:
    """A whole answer. `adapter` is None if the base model alone answered.

    `warnings` say why the encoded prompt may not be the one that the caller meant.
    """

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
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second of the request's time in the server, waiting included."""
        seconds = self.timing.total_seconds
        return self.usage.completion_tokens / seconds if seconds > 0 else 0.0
