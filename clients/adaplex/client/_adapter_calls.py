"""The unary calls of AdapterService as values, which both clients send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from adaplex.client._fields import build_message, dataclass_from, set_field, set_map_field
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
"""Targets of an alias: one version, versions with their shares, or a value of `Adapter.aliases`."""


@dataclass(frozen=True)
class AdapterCall(Generic[T]):
    """A unary call: the stub's method, the request, and the function that reads the response."""

    method: str
    request: Message
    read: Callable[[Any], T]


def load(name: str, uri: str, replace: bool) -> AdapterCall[UploadResult]:
    """Returns the call by which the server imports an adapter from a URI."""
    message = build_message(
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
    """Returns the call that merges stored adapters into a new one.

    Raises InvalidArgument for an unknown method or a value that its field cannot hold.
    """
    number = adapters_pb2.MergeMethod.DESCRIPTOR.values_by_name.get(
        f"MERGE_METHOD_{method.upper()}"
    )
    if number is None or not number.number:
        raise InvalidArgument.because("method", f"{method!r} is not a merge method")
    message = build_message(
        adapters_pb2.MergeAdaptersRequest,
        name=name,
        policy=upload_policy(replace),
        method=number.number,
        majority_sign=majority_sign,
    )
    for field, value in (("density", density), ("rank", rank), ("seed", seed)):
        if value is not None:
            set_field(message, field, value, "")
    for i, (selector, weight) in enumerate(weighted(sources, "sources")):
        source = message.sources.add()
        set_field(source, "adapter", selector, f"sources[{i}].")
        set_field(source, "weight", weight, f"sources[{i}].")
    return AdapterCall("MergeAdapters", message, upload_result)


def get(name: str) -> AdapterCall[AdapterDetails]:
    """Returns the call that reads one adapter, its report and its versions."""
    return AdapterCall(
        "GetAdapter", build_message(adapters_pb2.GetAdapterRequest, name=name), _to_details
    )


def list_page(
    *,
    page_size: int,
    page_token: str,
    name_prefix: str,
    labels: Mapping[str, str] | None,
    family: str,
    order_by: str,
) -> AdapterCall[tuple[list[Adapter], str]]:
    """Returns the call that reads one page of adapters and the token of the next page."""
    message = build_message(
        adapters_pb2.ListAdaptersRequest,
        page_size=page_size,
        page_token=page_token,
        order_by=order_by,
    )
    set_field(message.filter, "name_prefix", name_prefix, "filter.")
    set_field(message.filter, "family", family, "filter.")
    set_map_field(message.filter, "labels", labels or {}, "filter.")
    return AdapterCall("ListAdapters", message, _to_page)


def history(name: str) -> AdapterCall[tuple[AdapterEvent, ...]]:
    """Returns the call that reads the history of a name."""
    message = build_message(adapters_pb2.GetAdapterHistoryRequest, name=name)
    return AdapterCall("GetAdapterHistory", message, lambda m: tuple(map(_to_event, m.events)))


def update(
    name: str,
    *,
    description: str | None,
    set_labels: Mapping[str, str] | None,
    remove_labels: Sequence[str],
    pinned: bool | None,
) -> AdapterCall[Adapter]:
    """Returns the call that changes the fields of a name that are not None."""
    message = build_message(
        adapters_pb2.UpdateAdapterRequest, name=name, remove_labels=remove_labels
    )
    for field, value in (("description", description), ("pinned", pinned)):
        if value is not None:
            set_field(message, field, value, "")
    set_map_field(message, "set_labels", set_labels or {}, "")
    return AdapterCall("UpdateAdapter", message, _read_adapter)


def set_alias(name: str, alias: str, targets: Targets) -> AdapterCall[Adapter]:
    """Returns the call that sets the targets of an alias."""
    message = build_message(adapters_pb2.SetAliasRequest, name=name, alias=alias)
    for i, given in enumerate(_alias_targets(targets)):
        target = message.targets.add()
        set_field(target, "version", given.version, f"targets[{i}].")
        set_field(target, "weight", given.weight, f"targets[{i}].")
    return AdapterCall("SetAlias", message, _read_adapter)


def delete_alias(name: str, alias: str) -> AdapterCall[Adapter]:
    """Returns the call that deletes an alias."""
    message = build_message(adapters_pb2.DeleteAliasRequest, name=name, alias=alias)
    return AdapterCall("DeleteAlias", message, _read_adapter)


def rollback(name: str, alias: str) -> AdapterCall[Adapter]:
    """Returns the call that undoes the last change of an alias."""
    message = build_message(adapters_pb2.RollbackAliasRequest, name=name, alias=alias)
    return AdapterCall("RollbackAlias", message, _read_adapter)


def unload(name: str) -> AdapterCall[bool]:
    """Returns the call that evicts an adapter from memory; True if it was there."""
    message = build_message(adapters_pb2.UnloadAdapterRequest, name=name)
    return AdapterCall("UnloadAdapter", message, lambda m: bool(m.was_resident))


def delete(name: str) -> AdapterCall[int]:
    """Returns the call that deletes a name or one version; the number of deleted versions."""
    message = build_message(adapters_pb2.DeleteAdapterRequest, name=name)
    return AdapterCall("DeleteAdapter", message, lambda m: int(m.versions_deleted))


def upload_policy(replace: bool) -> adapters_pb2.UploadPolicy.ValueType:
    """Returns the policy for a name that exists: a new version if `replace`, else an error."""
    return adapters_pb2.UPLOAD_POLICY_REPLACE if replace else adapters_pb2.UPLOAD_POLICY_CREATE


def upload_result(message: Any, warnings: tuple[str, ...] = ()) -> UploadResult:
    """Returns the stored adapter from the response of an upload, a load or a merge, with the
    client's own warnings added.
    """
    report = _warned(_to_report(message.report), warnings)
    return UploadResult(_to_adapter(message.adapter), report, message.created)


def validation(
    message: adapters_pb2.ValidateAdapterResponse, warnings: tuple[str, ...] = ()
) -> Validation:
    """Returns the result of a dry run, with the client's own warnings added."""
    return Validation(message.valid, _warned(_to_report(message.report), warnings))


def _warned(report: AdapterReport, warnings: tuple[str, ...]) -> AdapterReport:
    return replace(report, warnings=(*report.warnings, *warnings))


def _to_adapter(message: adapters_pb2.Adapter) -> Adapter:
    return dataclass_from(
        Adapter,
        message,
        create_time=message.create_time.ToDatetime(UTC),
        update_time=message.update_time.ToDatetime(UTC),
        labels=dict(message.labels),
        aliases={alias.alias: _to_targets(alias.targets) for alias in message.aliases},
        tier=_TIERS.get(message.tier),
        invocation_tokens=tuple(message.invocation_tokens),
    )


def _to_report(message: adapters_pb2.AdapterReport) -> AdapterReport:
    return dataclass_from(
        AdapterReport,
        message,
        modules=tuple(
            dataclass_from(ModuleReport, module, primitives=tuple(module.primitives))
            for module in message.modules
        ),
        refusals=tuple(dataclass_from(Refusal, refusal) for refusal in message.refusals),
        notes=tuple(message.notes),
        warnings=tuple(message.warnings),
        invocation_tokens=tuple(message.invocation_tokens),
    )


def _to_details(message: adapters_pb2.GetAdapterResponse) -> AdapterDetails:
    versions = tuple(
        dataclass_from(AdapterVersion, version, create_time=version.create_time.ToDatetime(UTC))
        for version in message.versions
    )
    return AdapterDetails(_to_adapter(message.adapter), _to_report(message.report), versions)


def _to_page(message: adapters_pb2.ListAdaptersResponse) -> tuple[list[Adapter], str]:
    return [_to_adapter(each) for each in message.adapters], message.next_page_token


def _to_event(message: adapters_pb2.AdapterEvent) -> AdapterEvent:
    return dataclass_from(
        AdapterEvent,
        message,
        time=message.time.ToDatetime(UTC),
        before=_to_targets(message.before),
        after=_to_targets(message.after),
    )


def _read_adapter(message: Any) -> Adapter:
    return _to_adapter(message.adapter)


def _to_targets(messages: Any) -> tuple[AliasTarget, ...]:
    return tuple(dataclass_from(AliasTarget, target) for target in messages)


def _alias_targets(targets: Targets) -> tuple[AliasTarget, ...]:
    """Returns the targets as AliasTargets. Raises InvalidArgument for a list of other values."""
    if isinstance(targets, Mapping):
        return tuple(AliasTarget(version, weight) for version, weight in targets.items())
    if not isinstance(targets, Sequence):
        return (AliasTarget(targets),)
    if not all(isinstance(target, AliasTarget) for target in targets):
        raise InvalidArgument.because(
            "targets", "must be a version, a mapping of versions to shares, or AliasTargets"
        )
    return tuple(targets)
