"""Conversion of generations and server descriptions to and from protobuf, for both clients."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from adaplex.client._fields import dataclass_from, set_field
from adaplex.client.adapter_types import Weighted
from adaplex.client.errors import Internal, InvalidArgument
from adaplex.client.generation_types import (
    AdapterMode,
    AppliedAdapter,
    AppliedComponent,
    ChatMessage,
    Delta,
    Finished,
    FinishReason,
    Generation,
    GenerationEvent,
    Prompt,
    SamplingParams,
    Started,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from adaplex.client.types import AdaptableModule, BaseModelInfo, Capacity, Limits, ServerInfo
from adaplex.v1 import generation_pb2, server_pb2

_MODES = {
    AdapterMode.UNMERGED: generation_pb2.ADAPTER_MODE_UNMERGED,
    AdapterMode.MERGED: generation_pb2.ADAPTER_MODE_MERGED,
    AdapterMode.AUTO: generation_pb2.ADAPTER_MODE_AUTO,
}
_MODE_OF = {number: mode for mode, number in _MODES.items()}
_REASON_OF = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


# Values to messages.


@dataclass(frozen=True)
class GenerationCall:
    """A generation to send: its message, and the timeout (seconds) and id of its call."""

    spec: generation_pb2.GenerationSpec
    timeout: float | None
    request_id: str | None


def generation_call(
    prompt: Prompt,
    *,
    adapter: str | None = None,
    adapters: Weighted | None = None,
    routing_key: str = "",
    mode: AdapterMode | str | None = None,
    sampling: SamplingParams | None = None,
    timeout: float | None = None,
    cache_salt: str = "",
    priority: int = 0,
    request_id: str | None = None,
    add_special_tokens: bool | None = None,
    **sampling_fields: Any,
) -> GenerationCall:
    """Builds the message for a prompt and the keywords of `GenerateOptions`.

    Raises InvalidArgument for a value that its field cannot hold, TypeError for an unknown
    keyword. The server checks ranges.
    """
    spec = generation_pb2.GenerationSpec()
    _set_prompt(spec, prompt)
    set_field(spec, "adapter", adapter or "", "spec.")
    set_field(spec, "routing_key", routing_key, "spec.")
    if adapter and adapters:
        raise InvalidArgument.because("spec.adapters", "cannot be given together with adapter")
    for selector, weight in weighted(adapters or (), "spec.adapters"):
        part = spec.adapters.add()
        set_field(part, "adapter", selector, f"spec.adapters[{len(spec.adapters) - 1}].")
        set_field(part, "weight", weight, f"spec.adapters[{len(spec.adapters) - 1}].")
    set_field(spec, "cache_salt", cache_salt, "spec.")
    set_field(spec, "priority", priority, "spec.")
    if add_special_tokens is not None:
        set_field(spec, "add_special_tokens", add_special_tokens, "spec.")
    if mode is not None:
        spec.mode = _MODES[_mode(mode)]
    spec.sampling.SetInParent()
    for name, value in _chosen_fields(replace(sampling or SamplingParams(), **sampling_fields)):
        set_field(spec.sampling, name, value, "spec.sampling.")
    return GenerationCall(spec, timeout, request_id)


def weighted(given: Weighted, field: str) -> list[tuple[str, float]]:
    """Returns pairs of selector and weight; a selector without a weight has 1.

    Raises InvalidArgument naming the field if `given` is not a mapping or a list of them.
    """
    if isinstance(given, str) or not isinstance(given, Mapping | Iterable):
        raise InvalidArgument.because(field, f"must be a mapping or a list, not {given!r}")
    pairs: list[tuple[str, float]] = []
    for item in given.items() if isinstance(given, Mapping) else given:
        match (item, 1.0) if isinstance(item, str) else item:
            case str(selector), weight:
                pairs.append((selector, weight))
            case _:
                raise InvalidArgument.because(
                    field, f"{item!r} is not a selector or (selector, weight)"
                )
    return pairs


def _mode(mode: AdapterMode | str) -> AdapterMode:
    try:
        return AdapterMode(mode)
    except ValueError:
        choices = ", ".join(AdapterMode)
        raise InvalidArgument.because("spec.mode", f"{mode!r} is not one of {choices}") from None


def _chosen_fields(sampling: SamplingParams) -> list[tuple[str, Any]]:
    """Returns the fields that are not None, so that an absent one stays absent in the message."""
    chosen = [(field.name, getattr(sampling, field.name)) for field in fields(sampling)]
    return [(name, value) for name, value in chosen if value is not None]


def _set_prompt(spec: generation_pb2.GenerationSpec, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        set_field(spec, "text", prompt, "spec.")
    elif isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
        raise TypeError("prompt must be text, token ids, or a list of chat messages")
    else:
        items = list(prompt)
        if items and isinstance(items[0], ChatMessage | Mapping):
            spec.chat.messages.extend(_chat_message(item, at) for at, item in enumerate(items))
        else:
            spec.token_ids.SetInParent()
            ids = [_token_id(item, at) for at, item in enumerate(items)]
            set_field(spec.token_ids, "ids", ids, "spec.token_ids.")


def _token_id(item: Any, at: int) -> int:
    try:
        return operator.index(item)
    except TypeError:
        path = f"spec.token_ids.ids[{at}]"
        raise InvalidArgument.because(path, f"{item!r} is not a token id") from None


def _chat_message(item: Any, at: int) -> generation_pb2.ChatMessage:
    """Converts one message; a mapping must have exactly `role` and `content`."""
    path = f"spec.chat.messages[{at}]"
    if isinstance(item, Mapping):
        if set(item) != {"role", "content"}:
            raise InvalidArgument.because(path, "must have `role` and `content` and nothing else")
        item = ChatMessage(item["role"], item["content"])
    if not isinstance(item, ChatMessage):
        raise InvalidArgument.because(path, f"{item!r} is not a chat message")
    message = generation_pb2.ChatMessage()
    set_field(message, "role", item.role, f"{path}.")
    set_field(message, "content", item.content, f"{path}.")
    return message


# Messages to values.


def event(message: generation_pb2.GenerateStreamResponse) -> GenerationEvent | None:
    """Returns the event of a stream's message, None for a kind newer than this client."""
    match message.WhichOneof("event"):
        case "started":
            return _started(message.started)
        case "delta":
            return _delta(message.delta)
        case "finished":
            return _finished(message.finished)
        case _:
            return None


def generation(message: generation_pb2.GenerateResponse) -> Generation:
    """Returns the answer of a unary call. Raises Internal if its start or end is missing."""
    if not (message.HasField("started") and message.HasField("finished")):
        raise Internal("the server's response has no `started` or no `finished`")
    whole = Delta(message.text, tuple(message.token_ids), _logprobs(message.logprobs))
    return assemble(_started(message.started), [whole], _finished(message.finished))


def assemble(started: Started, deltas: list[Delta], finished: Finished) -> Generation:
    """Returns the whole answer from the events of its stream."""
    return Generation(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        adapter=started.adapter,
        finish_reason=finished.finish_reason,
        stop=finished.stop,
        usage=finished.usage,
        timing=finished.timing,
        request_id=started.request_id,
        model=started.model,
        warnings=started.warnings,
    )


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """Returns the server's description."""
    return dataclass_from(
        ServerInfo,
        message,
        model=dataclass_from(
            BaseModelInfo,
            message.model,
            modules=tuple(
                dataclass_from(AdaptableModule, module) for module in message.model.modules
            ),
        ),
        capacity=dataclass_from(Capacity, message.capacity),
        limits=dataclass_from(Limits, message.limits),
    )


def _started(message: generation_pb2.GenerationStarted) -> Started:
    applied = None
    if message.HasField("adapter"):
        mode = _MODE_OF.get(message.adapter.mode)
        applied = dataclass_from(
            AppliedAdapter,
            message.adapter,
            mode=mode,
            components=tuple(
                dataclass_from(AppliedComponent, part) for part in message.adapter.components
            ),
            warnings=tuple(message.adapter.warnings),
        )
    warnings = tuple(message.warnings)
    return dataclass_from(Started, message, adapter=applied, warnings=warnings)


def _delta(message: generation_pb2.GenerationDelta) -> Delta:
    return Delta(message.text, tuple(message.token_ids), _logprobs(message.logprobs))


def _finished(message: generation_pb2.GenerationFinished) -> Finished:
    return Finished(
        finish_reason=_REASON_OF.get(message.reason),
        stop=message.stop,
        usage=dataclass_from(Usage, message),
        timing=dataclass_from(Timing, message),
    )


def _logprobs(entries: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        dataclass_from(
            TokenLogprob, entry, top=tuple(dataclass_from(TopLogprob, top) for top in entry.top)
        )
        for entry in entries
    )
