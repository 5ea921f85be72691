"""Conversion between messages of generation.proto and our values; checks all its ranges."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from adaplex.adapters.api import MAX_COMPONENTS, Lease
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import (
    AdapterMode,
    AdapterRef,
    FinishReason,
    Logprob,
    SamplingParams,
)
from adaplex.v1 import generation_pb2

MAX_ROLE_CHARS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_SALT_CHARS = 256
MAX_MESSAGES = 1024
MAX_ROUTING_KEY_CHARS = 256

MODES = {
    generation_pb2.ADAPTER_MODE_UNMERGED: AdapterMode.UNMERGED,
    generation_pb2.ADAPTER_MODE_MERGED: AdapterMode.MERGED,
    generation_pb2.ADAPTER_MODE_AUTO: AdapterMode.AUTO,
}
MODES_OUT = {mode: number for number, mode in MODES.items()}
FINISH = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number; `above` excludes the lower bound."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        # NaN fails every comparison, so it is outside.
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        return f"must be in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


FLOATS = {
    "temperature": Range(0, 10),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, above=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}


@dataclass(frozen=True)
class ModelLimits:
    """Limits of the model that requests are checked against."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def check(field: str, fits: bool, reason: str) -> None:
    """Raises RequestInvalid that names the field, unless `fits`."""
    if not fits:
        raise RequestInvalid(field, reason)


def sampling_params(spec: generation_pb2.GenerationSpec, limits: ModelLimits) -> SamplingParams:
    """Returns the checked `spec.sampling`; absent fields have the defaults of SamplingParams."""
    sent, path = spec.sampling, "spec.sampling"
    default = SamplingParams()
    # ListFields has each optional field that was sent, also one sent as zero.
    given = {field.name for field, _ in sent.ListFields()}
    numbers = {name: float(getattr(sent, name)) for name in FLOATS if name in given}
    for name, value in numbers.items():
        check(f"{path}.{name}", value in FLOATS[name], str(FLOATS[name]))
    max_tokens = sent.max_tokens if "max_tokens" in given else default.max_tokens
    check(f"{path}.max_tokens", max_tokens >= 1, "must be at least 1")
    check(
        f"{path}.min_tokens",
        sent.min_tokens <= max_tokens,
        f"must be at most max_tokens={max_tokens}",
    )
    check(f"{path}.logprobs", sent.logprobs <= MAX_LOGPROBS, f"must be 0 to {MAX_LOGPROBS}")
    _check_stops(sent, limits)
    eos = frozenset() if sent.ignore_eos else limits.eos_token_ids
    return SamplingParams(
        **numbers,
        top_k=sent.top_k,
        seed=sent.seed if "seed" in given else secrets.randbits(64),
        max_tokens=max_tokens,
        min_tokens=sent.min_tokens,
        stop_token_ids=eos | frozenset(sent.stop_token_ids),
        logprobs=sent.logprobs if "logprobs" in given else None,
    )


def _check_stops(sent: generation_pb2.SamplingParams, limits: ModelLimits) -> None:
    path = "spec.sampling"
    check(f"{path}.stop", len(sent.stop) <= MAX_STOPS, f"must be at most {MAX_STOPS} strings")
    for i, stop in enumerate(sent.stop):
        check(
            f"{path}.stop[{i}]",
            1 <= len(stop) <= MAX_STOP_CHARS,
            f"must be 1 to {MAX_STOP_CHARS} characters",
        )
    check(
        f"{path}.stop_token_ids",
        len(sent.stop_token_ids) <= MAX_STOP_TOKENS,
        f"must be at most {MAX_STOP_TOKENS} tokens",
    )
    _check_vocabulary(f"{path}.stop_token_ids", sent.stop_token_ids, limits)


def _check_vocabulary(field: str, ids: Sequence[int], limits: ModelLimits) -> None:
    unknown = next((i for i, token in enumerate(ids) if token >= limits.vocab_size), None)
    reason = f"must be below the vocabulary size, {limits.vocab_size}"
    check(f"{field}[{unknown}]", unknown is None, reason)


def check_length(field: str, tokens: int, limits: ModelLimits) -> None:
    """Raises RequestInvalid unless a prompt has tokens and leaves room for one more token."""
    check(field, tokens > 0, "must have at least one token")
    limit = limits.max_model_len - 1
    reason = f"has {tokens} tokens; at most {limit} leave room to generate"
    check(field, tokens <= limit, reason)


def check_prompt_ids(spec: generation_pb2.GenerationSpec, limits: ModelLimits) -> None:
    """Raises RequestInvalid unless `spec.token_ids` is a valid prompt; checks the number first."""
    check_length("spec.token_ids", len(spec.token_ids.ids), limits)
    _check_vocabulary("spec.token_ids.ids", spec.token_ids.ids, limits)


def check_special_tokens(spec: generation_pb2.GenerationSpec) -> None:
    """Raises RequestInvalid if special tokens are to be added to a prompt that is not text."""
    fits = spec.WhichOneof("prompt") == "text" or not spec.add_special_tokens
    check("spec.add_special_tokens", fits, "must not be true unless spec.text is the prompt")


def check_chat(spec: generation_pb2.GenerationSpec) -> None:
    """Raises RequestInvalid unless `spec.chat` is a valid prompt; checks the number first."""
    fits = 1 <= len(spec.chat.messages) <= MAX_MESSAGES
    check("spec.chat.messages", fits, f"must be 1 to {MAX_MESSAGES} messages")
    for i, message in enumerate(spec.chat.messages):
        fits = 1 <= len(message.role) <= MAX_ROLE_CHARS and message.role.isprintable()
        reason = f"must be 1 to {MAX_ROLE_CHARS} printable characters"
        check(f"spec.chat.messages[{i}].role", fits, reason)


def chat_messages(spec: generation_pb2.GenerationSpec) -> list[dict[str, str]]:
    """Returns `spec.chat` as chat templates expect it."""
    return [{"role": m.role, "content": m.content} for m in spec.chat.messages]


def adapter_mode(spec: generation_pb2.GenerationSpec) -> AdapterMode | None:
    """Returns the checked `spec.mode`, None if the request leaves it unspecified."""
    if spec.mode == generation_pb2.ADAPTER_MODE_UNSPECIFIED:
        return None
    check("spec.mode", spec.mode in MODES, "must be a value of AdapterMode")
    return MODES[spec.mode]


def cache_salt(spec: generation_pb2.GenerationSpec) -> str:
    """Returns the checked `spec.cache_salt`."""
    fits = len(spec.cache_salt) <= MAX_SALT_CHARS
    check("spec.cache_salt", fits, f"must be at most {MAX_SALT_CHARS} characters")
    return spec.cache_salt


def priority(spec: generation_pb2.GenerationSpec) -> int:
    """Returns the checked `spec.priority`."""
    fits = abs(spec.priority) <= MAX_PRIORITY
    check("spec.priority", fits, f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return spec.priority


def requested_adapters(spec: generation_pb2.GenerationSpec) -> list[tuple[str, float]]:
    """Returns selectors and weights, none for the base. The registry checks both."""
    if not spec.adapters:
        return [(spec.adapter, 1.0)] if spec.adapter else []
    check("spec.adapters", not spec.adapter, "must be empty beside spec.adapter")
    fits = len(spec.adapters) <= MAX_COMPONENTS
    check("spec.adapters", fits, f"must be at most {MAX_COMPONENTS} adapters")
    for i, part in enumerate(spec.adapters):
        check(f"spec.adapters[{i}].adapter", bool(part.adapter), "must name an adapter")
    return [(p.adapter, p.weight if p.HasField("weight") else 1.0) for p in spec.adapters]


def routing_key(spec: generation_pb2.GenerationSpec) -> str:
    """Returns the checked `spec.routing_key`."""
    fits = len(spec.routing_key) <= MAX_ROUTING_KEY_CHARS
    check("spec.routing_key", fits, f"must be at most {MAX_ROUTING_KEY_CHARS} characters")
    return spec.routing_key


def applied(ref: AdapterRef, lease: Lease) -> generation_pb2.AppliedAdapter:
    """Returns the proof of the content that generates."""
    components = [
        generation_pb2.AppliedComponent(
            name=part.record.name,
            version=part.record.version,
            digest=part.record.digest,
            weight=part.weight,
            alias=part.record.alias,
        )
        for part in lease.parts
    ]
    return generation_pb2.AppliedAdapter(
        name=ref.name,
        version=ref.version,
        digest=ref.digest,
        mode=MODES_OUT[ref.mode],
        modules=ref.traits.modules,
        alias=lease.record.alias,
        components=components,
        warnings=lease.warnings,
    )


def token_logprob(logprob: Logprob) -> generation_pb2.TokenLogprob:
    """Converts the log probabilities of one token."""
    top = [generation_pb2.TopLogprob(token_id=t, logprob=p) for t, p in logprob.top]
    return generation_pb2.TokenLogprob(token_id=logprob.token, logprob=logprob.logprob, top=top)
