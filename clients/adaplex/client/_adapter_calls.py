"""The calls of AdapterService as values: both clients make them, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from adaplex.client._fields import flat, put, put_map, request
from adaplex.client._wire import weighted
from adaplex.client.adapter_types import (
    Adapter,
    AdapterDetails,
    AdapterEvent,
    AdapterReport,
    AdapterVersion,
    AliasTarget,
    ModuleReport,
    Refusal,
    ResidencyTier,
    UploadResult,
    Validation,
    Weighted,
)
from adaplex.client.errors import InvalidArgument
from adaplex.v1 import adapters_pb2

T = TypeVar("T")

_TIERS = {
    adapters_pb2.RESIDENCY_TIER_ARENA: ResidencyTier.ARENA,
    adapters_pb2.RESIDENCY_TIER_HOST: ResidencyTier.HOST,
    adapters_pb2.RESIDENCY_TIER_DISK: ResidencyTier.DISK,
    adapters_pb2.RESIDENCY_TIER_SOURCE: ResidencyTier.SOURCE,
}

Targets = int | Mapping[int, float] | Sequence[AliasTarget]
"""One version, or several and their shares; also as `Adapter.aliases` has them."""


@dataclass(frozen=True)
class AdapterCall(Generic[T]):
    """A unary call: the method of the stub, the message, and what the answer means."""

    method: str
    request: Message
    read: Callable[[Any], T]


def load(name: str, uri: str, replace: bool) -> AdapterCall[UploadResult]:
    """Has the server import what a URI names."""
    message = request(
        adapters_pb2.LoadAdapterRequest, name=name, uri=uri, policy=upload_policy(replace)
    )
    return AdapterCall("LoadAdapter", message, upload_result)


def merge(
    name: str,
    sources: Weighted,
    replace: bool,
    *,
    method: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    majority_sign: str = "",
) -> AdapterCall[UploadResult]:
    """Has the server make an adapter out of stored ones."""
    number = adapters_pb2.MergeMethod.DESCRIPTOR.values_by_name.get(
        f"MERGE_METHOD_{method.upper()}"
    )
    if number is None or not number.number:
        raise InvalidArgument.because("method", f"{method!r} is no way to merge")
    message = request(
        adapters_pb2.MergeAdaptersRequest,
        name=name,
        policy=upload_policy(replace),
        method=number.number,
        majority_sign=majority_sign,
    )
    for field, value in (("density", density), ("rank", rank), ("seed", seed)):
        if value is not None:
            put(message, field, value, "")
    for i, (selector, weight) in enumerate(weighted(sources, "sources")):
        source = message.sources.add()
        put(source, "adapter", selector, f"sources[{i}].")
        put(source, "weight", weight, f"sources[{i}].")
    return AdapterCall("MergeAdapters", message, upload_result)


def get(name: str) -> AdapterCall[AdapterDetails]:
    """Asks for one adapter."""
    return AdapterCall("GetAdapter", request(adapters_pb2.GetAdapterRequest, name=name), _details)


def page(
    *,
    page_size: int,
    page_token: str,
    name_prefix: str,
    labels: Mapping[str, str] | None,
    family: str,
    order_by: str,
) -> AdapterCall[tuple[list[Adapter], str]]:
    """Asks for one page of adapters, and the token of the next."""
    message = request(
        adapters_pb2.ListAdaptersRequest,
        page_size=page_size,
        page_token=page_token,
        order_by=order_by,
    )
    put(message.filter, "name_prefix", name_prefix, "filter.")
    put(message.filter, "family", family, "filter.")
    put_map(message.filter, "labels", labels or {}, "filter.")
    return AdapterCall("ListAdapters", message, _page)


def history(name: str) -> AdapterCall[tuple[AdapterEvent, ...]]:
    """Asks what happened to a name."""
    message = request(adapters_pb2.GetAdapterHistoryRequest, name=name)
    return AdapterCall("GetAdapterHistory", message, lambda m: tuple(map(_event, m.events)))


def update(
    name: str,
    *,
    description: str | None,
    set_labels: Mapping[str, str] | None,
    remove_labels: Sequence[str],
    pinned: bool | None,
) -> AdapterCall[Adapter]:
    """Changes what is not None."""
    message = request(adapters_pb2.UpdateAdapterRequest, name=name, remove_labels=remove_labels)
    for field, value in (("description", description), ("pinned", pinned)):
        if value is not None:
            put(message, field, value, "")
    put_map(message, "set_labels", set_labels or {}, "")
    return AdapterCall("UpdateAdapter", message, _entry)


def set_alias(name: str, alias: str, targets: Targets) -> AdapterCall[Adapter]:
    """Points an alias elsewhere."""
    message = request(adapters_pb2.SetAliasRequest, name=name, alias=alias)
    for i, chosen in enumerate(_chosen(targets)):
        target = message.targets.add()
        put(target, "version", chosen.version, f"targets[{i}].")
        put(target, "weight", chosen.weight, f"targets[{i}].")
    return AdapterCall("SetAlias", message, _entry)


def delete_alias(name: str, alias: str) -> AdapterCall[Adapter]:
    """Forgets an alias."""
    message = request(adapters_pb2.DeleteAliasRequest, name=name, alias=alias)
    return AdapterCall("DeleteAlias", message, _entry)


def rollback(name: str, alias: str) -> AdapterCall[Adapter]:
    """Undoes the last change of an alias."""
    message = request(adapters_pb2.RollbackAliasRequest, name=name, alias=alias)
    return AdapterCall("RollbackAlias", message, _entry)


def unload(name: str) -> AdapterCall[bool]:
    """Frees an adapter's memory."""
    message = request(adapters_pb2.UnloadAdapterRequest, name=name)
    return AdapterCall("UnloadAdapter", message, lambda m: bool(m.was_resident))


def delete(name: str) -> AdapterCall[int]:
    """Forgets a name, or a version."""
    message = request(adapters_pb2.DeleteAdapterRequest, name=name)
    return AdapterCall("DeleteAdapter", message, lambda m: int(m.versions_deleted))


def upload_policy(replace: bool) -> adapters_pb2.UploadPolicy.ValueType:
    """What to do about a name that is taken."""
    return adapters_pb2.UPLOAD_POLICY_REPLACE if replace else adapters_pb2.UPLOAD_POLICY_CREATE


def upload_result(message: Any) -> UploadResult:
    """What was stored: of an upload, a load or a merge."""
    return UploadResult(_adapter(message.adapter), _report(message.report), message.created)


def validation(message: adapters_pb2.ValidateAdapterResponse) -> Validation:
    """The answer to a dry run."""
    return Validation(message.valid, _report(message.report))


def _adapter(message: adapters_pb2.Adapter) -> Adapter:
    return flat(
        Adapter,
        message,
        create_time=message.create_time.ToDatetime(UTC),
        update_time=message.update_time.ToDatetime(UTC),
        labels=dict(message.labels),
        aliases={alias.alias: _targets(alias.targets) for alias in message.aliases},
        tier=_TIERS.get(message.tier),
        invocation_tokens=tuple(message.invocation_tokens),
    )


def _report(message: adapters_pb2.AdapterReport) -> AdapterReport:
    return flat(
        AdapterReport,
        message,
        modules=tuple(
            flat(ModuleReport, module, primitives=tuple(module.primitives))
            for module in message.modules
        ),
        refusals=tuple(flat(Refusal, refusal) for refusal in message.refusals),
        notes=tuple(message.notes),
        warnings=tuple(message.warnings),
        invocation_tokens=tuple(message.invocation_tokens),
    )


def _details(message: adapters_pb2.GetAdapterResponse) -> AdapterDetails:
    versions = tuple(
        flat(AdapterVersion, version, create_time=version.create_time.ToDatetime(UTC))
        for version in message.versions
    )
    return AdapterDetails(_adapter(message.adapter), _report(message.report), versions)


def _page(message: adapters_pb2.ListAdaptersResponse) -> tuple[list[Adapter], str]:
    return [_adapter(each) for each in message.adapters], message.next_page_token


def _event(message: adapters_pb2.AdapterEvent) -> AdapterEvent:
    return flat(
        AdapterEvent,
        message,
        time=message.time.ToDatetime(UTC),
        before=_targets(message.before),
        after=_targets(message.after),
    )


def _entry(message: Any) -> Adapter:
    return _adapter(message.adapter)


def _targets(messages: Any) -> tuple[AliasTarget, ...]:
    return tuple(flat(AliasTarget, target) for target in messages)


def _chosen(targets: Targets) -> tuple[AliasTarget, ...]:
    """Targets in any of their forms. Raises InvalidArgument for what is none."""
    if isinstance(targets, Mapping):
        return tuple(AliasTarget(version, weight) for version, weight in targets.items())
    if not isinstance(targets, Sequence):
        return (AliasTarget(targets),)
    if not all(isinstance(target, AliasTarget) for target in targets):
        raise InvalidArgument.because("targets", "a list must be of AliasTarget")
    return tuple(targets)
