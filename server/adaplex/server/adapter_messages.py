"""Conversion between messages of adapters.proto and our values; checks all its ranges."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping

from adaplex.adapters.api import (
    MAX_SOURCES,
    MAX_TARGETS,
    AdapterRecord,
    Event,
    FileSpec,
    MergeMethod,
    MergePlan,
    NameRecord,
    Order,
    Query,
    Report,
    Split,
    Target,
)
from adaplex.server.generation_messages import check
from adaplex.v1 import adapters_pb2

MAX_PAGE = 1000
MAX_FILES = 16
"""Announced files of one upload; an adapter has far fewer."""
MAX_FILTER_LABELS = 16
ORDERS: tuple[Order, ...] = ("name", "create_time", "update_time", "stored_bytes")
METHODS = {
    adapters_pb2.MergeMethod.Value(f"MERGE_METHOD_{method.name}"): method for method in MergeMethod
}


def replaces(field: str, policy: adapters_pb2.UploadPolicy.ValueType) -> bool:
    """Returns True if an existing name gets a new version. Raises RequestInvalid."""
    known = policy in adapters_pb2.UploadPolicy.values()
    check(field, known, "must be a value of UploadPolicy")
    return policy == adapters_pb2.UPLOAD_POLICY_REPLACE


def file_specs(upload: adapters_pb2.AdapterUpload) -> list[FileSpec]:
    """Returns the announced files, their number checked; the intake checks the rest."""
    fits = len(upload.files) <= MAX_FILES
    check("metadata.files", fits, f"must be at most {MAX_FILES} files")
    return [FileSpec(name=f.name, size=f.size_bytes, sha256=f.sha256) for f in upload.files]


def query(request: adapters_pb2.ListAdaptersRequest) -> Query:
    """Returns the checked query of a list."""
    check("page_size", request.page_size <= MAX_PAGE, f"must be 1 to {MAX_PAGE}, or 0 for 100")
    column, _, direction = (request.order_by or "name").partition(" ")
    order = next((order for order in ORDERS if order == column), None)
    known = order is not None and direction in ("", "asc", "desc")
    check("order_by", known, f"must be one of {', '.join(ORDERS)}, optionally with ` desc`")
    assert order is not None
    fits = len(request.filter.labels) <= MAX_FILTER_LABELS
    check("filter.labels", fits, f"must be at most {MAX_FILTER_LABELS} labels")
    return Query(
        limit=request.page_size or 100,
        order=order,
        descending=direction == "desc",
        after=_after(request),
        prefix=request.filter.name_prefix,
        labels=dict(request.filter.labels),
        family=request.filter.family,
    )


def page_token(request: adapters_pb2.ListAdaptersRequest, after: tuple[str | int, str]) -> str:
    """Returns the token of the page that begins after `after`."""
    token = json.dumps([_list_identity(request), *after])
    return base64.urlsafe_b64encode(token.encode()).decode()


def _after(request: adapters_pb2.ListAdaptersRequest) -> tuple[str | int, str] | None:
    """Returns the position of a page token, which must be of the same filter and order."""
    if not request.page_token:
        return None
    try:
        identity, value, name = json.loads(base64.urlsafe_b64decode(request.page_token))
        fits = isinstance(value, str) or (type(value) is int and abs(value) < 1 << 63)
        valid = fits and isinstance(name, str) and bool(f"{value}{name}".encode())
    except (ValueError, TypeError, RecursionError, binascii.Error):
        valid, identity, value, name = False, None, "", ""
    check("page_token", valid, "must be a next_page_token of this server")
    same = identity == _list_identity(request)
    check("page_token", same, "must be used with the filter and order of its list")
    return value, name


def _list_identity(request: adapters_pb2.ListAdaptersRequest) -> list[object]:
    """Returns order and filter, which all pages of one list share."""
    chosen = request.filter
    labels = sorted(chosen.labels.items())
    return [request.order_by, chosen.name_prefix, chosen.family, [list(pair) for pair in labels]]


def merge_plan(request: adapters_pb2.MergeAdaptersRequest) -> tuple[list[str], MergePlan]:
    """Returns the selectors of the sources and the checked plan of their merge."""
    fits = 1 <= len(request.sources) <= MAX_SOURCES
    check("sources", fits, f"must be 1 to {MAX_SOURCES} adapters")
    for i, source in enumerate(request.sources):
        check(f"sources[{i}].adapter", bool(source.adapter), "must name an adapter")
    check("method", request.method in METHODS, "must be a value of MergeMethod")
    sign = request.majority_sign or "total"
    check("majority_sign", sign in ("total", "frequency"), "must be `total` or `frequency`")
    plan = MergePlan(
        method=METHODS[request.method],
        weights=tuple(s.weight if s.HasField("weight") else 1.0 for s in request.sources),
        density=request.density if request.HasField("density") else None,
        majority_sign="frequency" if sign == "frequency" else "total",
        rank=request.rank if request.HasField("rank") else None,
        seed=request.seed,
    )
    return [source.adapter for source in request.sources], plan


def targets(sent: Iterable[adapters_pb2.AliasTarget]) -> list[Target]:
    """Returns the targets of an alias, their number checked; the registry checks the rest."""
    split = [Target(target.version, target.weight or 1.0) for target in sent]
    check("targets", 1 <= len(split) <= MAX_TARGETS, f"must be 1 to {MAX_TARGETS} targets")
    return split


def adapter(
    record: AdapterRecord, entry: NameRecord, tier: adapters_pb2.ResidencyTier.ValueType
) -> adapters_pb2.Adapter:
    """Converts a stored adapter."""
    message = adapters_pb2.Adapter(
        name=record.name,
        version=record.version,
        digest=record.digest,
        family=record.family,
        modules=record.traits.modules,
        max_rank=record.traits.max_rank,
        stored_bytes=record.stored_bytes,
        packed_bytes=record.packed_bytes,
        resident=tier == adapters_pb2.RESIDENCY_TIER_ARENA,
        tier=tier,
        source=record.source,
        actor=record.actor,
        base_fingerprint=record.base,
        signer=record.signer,
        description=entry.description,
        labels=dict(entry.labels),
        pinned=entry.pinned,
        aliases=_aliases(entry.aliases),
        leading_tokens=record.traits.leading,
        invocation_tokens=record.traits.invocation,
        merged_only=record.traits.merged_only,
    )
    message.create_time.FromDatetime(record.created)
    message.update_time.FromDatetime(entry.updated)
    return message


def versions(entry: NameRecord) -> list[adapters_pb2.AdapterVersion]:
    """Converts every version of a name, oldest first."""
    messages = []
    for version in entry.versions:
        message = adapters_pb2.AdapterVersion(
            version=version.number,
            digest=version.digest,
            stored_bytes=version.stored_bytes,
            source=version.source,
            actor=version.actor,
        )
        message.create_time.FromDatetime(version.created)
        messages.append(message)
    return messages


def event(change: Event) -> adapters_pb2.AdapterEvent:
    """Converts one event of a name's history."""
    message = adapters_pb2.AdapterEvent(
        kind=change.kind,
        version=change.version,
        digest=change.digest,
        alias=change.alias,
        before=_targets(change.before),
        after=_targets(change.after),
        actor=change.actor,
        source=change.source,
        detail=change.detail,
    )
    message.time.FromDatetime(change.time)
    return message


def report(found: Report) -> adapters_pb2.AdapterReport:
    """Converts the report on a checkpoint."""
    return adapters_pb2.AdapterReport(
        family=found.family,
        digest=found.digest,
        packed_bytes=found.packed_bytes,
        notes=found.notes,
        warnings=found.warnings,
        refusals=[adapters_pb2.Refusal(where=r.where, reason=r.reason) for r in found.refusals],
        modules=[
            adapters_pb2.ModuleReport(
                module=m.module,
                rank=m.rank,
                scale=m.scale,
                in_features=m.in_features,
                out_features=m.out_features,
                bias=m.bias,
                primitives=m.primitives,
            )
            for m in found.modules
        ],
        prefix_tokens=found.prefix_tokens,
        virtual_tokens=found.virtual_tokens,
        invocation_tokens=found.traits.invocation,
        merged_only=found.traits.merged_only,
        merged_bytes=found.merged_bytes,
    )


def _aliases(aliases: Mapping[str, Split]) -> list[adapters_pb2.Alias]:
    return [
        adapters_pb2.Alias(alias=alias, targets=_targets(split))
        for alias, split in sorted(aliases.items())
    ]


def _targets(split: Split) -> list[adapters_pb2.AliasTarget]:
    return [adapters_pb2.AliasTarget(version=t.version, weight=t.weight) for t in split]
