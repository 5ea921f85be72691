"""Between protobuf messages and our own values. Every range of generation.proto is checked here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from adaplex.adapters.catalog import AdapterRecord
from adaplex.adapters.registry import NAME
from adaplex.adapters.report import Report
from adaplex.adapters.staging import FileSpec
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import (
    AdapterMode,
    AdapterRef,
    FinishReason,
    Logprob,
    SamplingParams,
)
from adaplex.v1 import adapters_pb2, generation_pb2

ROLES = ("system", "user", "assistant")
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_SALT_CHARS = 256
MAX_PAGE = 1000
MAX_MESSAGES = 1024
MAX_FILES = 16
"""Announced files that are looked at one by one; an adapter has far fewer."""

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
    """Bounds of a number; `above` excludes the lower one."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        # Written so that NaN is outside.
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
    """What of the model requests are checked against."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def check(field: str, fits: bool, reason: str) -> None:
    """Raises RequestInvalid when the field does not fit."""
    if not fits:
        raise RequestInvalid(field, reason)


def sampling_params(spec: generation_pb2.GenerationSpec, limits: ModelLimits) -> SamplingParams:
    """`spec.sampling`, checked. An absent field takes the default of SamplingParams."""
    sent, path = spec.sampling, "spec.sampling"
    default = SamplingParams()
    # ListFields holds each optional field that was sent, also one sent as zero.
    given = {field.name for field, _ in sent.ListFields()}
    numbers = {name: float(getattr(sent, name)) for name in FLOATS if name in given}
    for name, value in numbers.items():
        check(f"{path}.{name}", value in FLOATS[name], str(FLOATS[name]))
    max_tokens = sent.max_tokens if "max_tokens" in given else default.max_tokens
    check(f"{path}.max_tokens", max_tokens >= 1, "must be at least 1")
    check(
        f"{path}.min_tokens", sent.min_tokens <= max_tokens, f"must be at most {max_tokens} tokens"
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
    reason = f"must be below the vocabulary's size of {limits.vocab_size}"
    check(f"{field}[{unknown}]", unknown is None, reason)


def check_length(field: str, tokens: int, limits: ModelLimits) -> None:
    """Raises RequestInvalid unless a prompt has tokens and leaves room for one more."""
    check(field, tokens > 0, "must give at least one token")
    longest = limits.max_model_len - 1
    reason = f"has {tokens} tokens; at most {longest} leave room for an answer"
    check(field, tokens <= longest, reason)


def check_prompt_ids(spec: generation_pb2.GenerationSpec, limits: ModelLimits) -> None:
    """Raises RequestInvalid unless `spec.token_ids` can be a prompt: first their number."""
    check_length("spec.token_ids", len(spec.token_ids.ids), limits)
    _check_vocabulary("spec.token_ids.ids", spec.token_ids.ids, limits)


def check_chat(spec: generation_pb2.GenerationSpec) -> None:
    """Raises RequestInvalid unless `spec.chat` can be a prompt: first its number of messages."""
    fits = 1 <= len(spec.chat.messages) <= MAX_MESSAGES
    check("spec.chat.messages", fits, f"must be 1 to {MAX_MESSAGES} messages")
    for i, message in enumerate(spec.chat.messages):
        field = f"spec.chat.messages[{i}].role"
        check(field, message.role in ROLES, f"must be one of {', '.join(ROLES)}")


def chat_messages(spec: generation_pb2.GenerationSpec) -> list[dict[str, str]]:
    """`spec.chat` as a chat template takes it."""
    return [{"role": m.role, "content": m.content} for m in spec.chat.messages]


def adapter_mode(spec: generation_pb2.GenerationSpec, default: AdapterMode) -> AdapterMode:
    """`spec.mode`, or the server's default."""
    if spec.mode == generation_pb2.ADAPTER_MODE_UNSPECIFIED:
        return default
    check("spec.mode", spec.mode in MODES, "must be a value of AdapterMode")
    return MODES[spec.mode]


def cache_salt(spec: generation_pb2.GenerationSpec) -> str:
    """`spec.cache_salt`, checked."""
    fits = len(spec.cache_salt) <= MAX_SALT_CHARS
    check("spec.cache_salt", fits, f"must be at most {MAX_SALT_CHARS} characters")
    return spec.cache_salt


def priority(spec: generation_pb2.GenerationSpec) -> int:
    """`spec.priority`, checked."""
    fits = abs(spec.priority) <= MAX_PRIORITY
    check("spec.priority", fits, f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return spec.priority


def adapter_ref(record: AdapterRecord, mode: AdapterMode) -> AdapterRef:
    """What a request is bound to."""
    return AdapterRef(
        name=record.name,
        version=record.version,
        digest=record.digest,
        packed_bytes=record.packed_bytes,
        modules=record.modules,
        mode=mode,
    )


def applied(ref: AdapterRef) -> generation_pb2.AppliedAdapter:
    """The proof of what answers."""
    return generation_pb2.AppliedAdapter(
        name=ref.name,
        version=ref.version,
        digest=ref.digest,
        mode=MODES_OUT[ref.mode],
        modules=ref.modules,
    )


def token_logprob(logprob: Logprob) -> generation_pb2.TokenLogprob:
    """One token's log probabilities."""
    top = [generation_pb2.TopLogprob(token_id=t, logprob=p) for t, p in logprob.top]
    return generation_pb2.TokenLogprob(token_id=logprob.token, logprob=logprob.logprob, top=top)


def replaces(field: str, policy: adapters_pb2.UploadPolicy.ValueType) -> bool:
    """Whether a taken name gets a new version."""
    known = policy in adapters_pb2.UploadPolicy.values()
    check(field, known, "must be a value of UploadPolicy")
    return policy == adapters_pb2.UPLOAD_POLICY_REPLACE


def file_specs(upload: adapters_pb2.AdapterUpload) -> list[FileSpec]:
    """The announced files, not too many; the registry checks them."""
    fits = len(upload.files) <= MAX_FILES
    check("metadata.files", fits, f"must be at most {MAX_FILES} files")
    return [FileSpec(name=f.name, size=f.size_bytes, sha256=f.sha256) for f in upload.files]


def page(request: adapters_pb2.ListAdaptersRequest) -> tuple[int, str]:
    """Size and token of a page, checked."""
    check("page_size", request.page_size <= MAX_PAGE, f"must be 1 to {MAX_PAGE}, or 0 for 100")
    known = not request.page_token or NAME.fullmatch(request.page_token) is not None
    check("page_token", known, "must be a next_page_token of this server")
    return request.page_size or 100, request.page_token


def adapter(record: AdapterRecord, *, resident: bool) -> adapters_pb2.Adapter:
    """A stored adapter as clients see it."""
    message = adapters_pb2.Adapter(
        name=record.name,
        version=record.version,
        digest=record.digest,
        family=record.family,
        modules=record.modules,
        max_rank=record.max_rank,
        stored_bytes=record.stored_bytes,
        packed_bytes=record.packed_bytes,
        resident=resident,
    )
    message.create_time.FromDatetime(record.created)
    return message


def report(found: Report) -> adapters_pb2.AdapterReport:
    """What a checkpoint says, as clients see it."""
    return adapters_pb2.AdapterReport(
        family=found.family,
        digest=found.digest,
        packed_bytes=found.packed_bytes,
        notes=found.notes,
        refusals=[adapters_pb2.Refusal(where=r.where, reason=r.reason) for r in found.refusals],
        modules=[
            adapters_pb2.ModuleReport(
                module=m.module,
                rank=m.rank,
                scale=m.scale,
                in_features=m.in_features,
                out_features=m.out_features,
                bias=m.bias,
            )
            for m in found.modules
        ],
    )
