"""The values of AdapterService: frozen dataclasses without protobuf. See types.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypedDict

Weighted = Mapping[str, float] | Sequence[tuple[str, float] | str]
"""Weights of adapters by selector, or a list of selectors with weights; a selector alone has 1."""


class MergeOptions(TypedDict, total=False):
    """The keywords of `merge`; PEFT's `add_weighted_adapter` has the same.

    `method`: linear (default), cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd,
    dare_ties_svd, magnitude_prune or magnitude_prune_svd.
    `density`: fraction of the values that ties, dare and magnitude_prune keep.
    `rank`: rank of the result of an svd method.
    `seed`: seed of the values that dare drops at random.
    `majority_sign`: how ties elects a sign: `total` (sum of the values) or `frequency`.
    """

    method: str
    density: float | None
    rank: int | None
    seed: int | None
    majority_sign: str


class ResidencyTier(StrEnum):
    """The fastest memory in which an adapter is: the device's arena, host memory, the server's disk
    or its source.
    """

    ARENA = "arena"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"


@dataclass(frozen=True)
class AliasTarget:
    """A version to which an alias points. `weight` is its share of requests, relative to those of
    the other targets.
    """

    version: int
    weight: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """One version of a stored adapter, and the metadata of its name.

    `digest` is `sha256:<64 hex digits>` of the content. `modules` is the number of modules of the
    base that it changes, `packed_bytes` its size in the arena. `resident` is True while it is in
    the device's memory. `pinned`, `description`, `labels` and `aliases` (alias to targets) belong
    to the name. `source` says where the content came from, `actor` who stored it (unauthenticated).
    `base_fingerprint` identifies the base it was checked against, `signer` the key that signed it.
    `tier` is None for one that this client does not know. `leading_tokens` is the number of
    positions that it puts before the prompt. With `invocation_tokens` it applies from their last
    occurrence in the prompt on. `merged_only` adapters cannot be served unmerged.
    """

    name: str
    version: int
    digest: str
    family: str
    modules: int
    max_rank: int
    stored_bytes: int
    packed_bytes: int
    create_time: datetime
    resident: bool
    description: str
    labels: Mapping[str, str] = field(hash=False)
    pinned: bool
    aliases: Mapping[str, tuple[AliasTarget, ...]] = field(hash=False)
    source: str
    actor: str
    base_fingerprint: str
    signer: str
    update_time: datetime
    tier: ResidencyTier | None
    leading_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    merged_only: bool = False


@dataclass(frozen=True)
class AdapterVersion:
    """One version of a name. `source` says where it came from, `actor` who stored it."""

    version: int
    digest: str
    create_time: datetime
    stored_bytes: int
    source: str
    actor: str


@dataclass(frozen=True)
class AdapterEvent:
    """A change of a name. `kind` is `upload`, `alias`, `update`, `delete_version` or `delete`.

    `before` and `after` are the targets of a changed alias, empty if it was not set. `actor` is the
    caller's self-reported identity (unauthenticated).
    """

    time: datetime
    kind: str
    version: int
    digest: str
    alias: str
    before: tuple[AliasTarget, ...]
    after: tuple[AliasTarget, ...]
    actor: str
    source: str
    detail: str


@dataclass(frozen=True)
class ModuleReport:
    """How an adapter changes one module of the base. `primitives` names all that it applies there;
    `rank` and `scale` are those of its low-rank pair.
    """

    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    bias: bool
    primitives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A reason not to serve a checkpoint. `where` is a file, a config field or a tensor."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class AdapterReport:
    """How a checkpoint was read, and what the server would apply to the base.

    `refusals` says why it cannot be served; empty if it can. `warnings` name doubts, `notes` fields
    of the checkpoint that have no effect. `packed_bytes` is its size in the arena. `prefix_tokens`
    is the number of positions before the prompt for which it has keys and values, `virtual_tokens`
    the number for which it has embeddings. `merged_bytes` is the memory of its merged weights if
    it is `merged_only`.
    """

    family: str
    digest: str
    modules: tuple[ModuleReport, ...]
    packed_bytes: int
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    prefix_tokens: int = 0
    virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    merged_only: bool = False
    merged_bytes: int = 0


@dataclass(frozen=True)
class AdapterDetails:
    """A stored adapter, its report, and every version of its name."""

    adapter: Adapter
    report: AdapterReport
    versions: tuple[AdapterVersion, ...]


@dataclass(frozen=True)
class UploadResult:
    """A stored adapter. `created` is False if the name already had this content."""

    adapter: Adapter
    report: AdapterReport
    created: bool


@dataclass(frozen=True)
class Validation:
    """The result of a dry run. `report.refusals` says why a checkpoint is not valid."""

    valid: bool
    report: AdapterReport
