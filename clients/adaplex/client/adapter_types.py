"""What the server says of adapters: frozen values, no protobuf. See types.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypedDict

Weighted = Mapping[str, float] | Sequence[tuple[str, float] | str]
"""Adapters by selector, with their weights; a selector alone has weight 1."""


class MergeOptions(TypedDict, total=False):
    """The keywords of `merge`.

    `method` is one of linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd,
    dare_ties_svd, magnitude_prune and magnitude_prune_svd. `density` is the share of values that
    pruning keeps, `rank` that of an SVD's result, `seed` that of what dare drops, `majority_sign`
    `total` or `frequency`.
    """

    method: str
    density: float | None
    rank: int | None
    seed: int | None
    majority_sign: str


class ResidencyTier(StrEnum):
    """The fastest memory that holds an adapter."""

    ARENA = "arena"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"


@dataclass(frozen=True)
class AliasTarget:
    """A version, and its share of requests relative to the other targets."""

    version: int
    weight: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """One version of a stored adapter, and what is known of its name.

    `resident`: in the device's memory now. `base_fingerprint` is that of the base it was checked
    against, `signer` the key that signed it. `leading_tokens` are positions that it puts before the
    prompt; where `invocation_tokens` are, it applies from where they last begin in the prompt.
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
    """One version of a name."""

    version: int
    digest: str
    create_time: datetime
    stored_bytes: int
    source: str
    actor: str


@dataclass(frozen=True)
class AdapterEvent:
    """Something that happened to a name: `upload`, `alias`, `update`, `delete_version`, `delete`.

    `before` and `after` are an alias's targets, empty when it was not set.
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
    """How one module of the base is changed; `primitives` names all that is applied to it."""

    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    bias: bool
    primitives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """One reason not to serve a checkpoint: where (file, config field or tensor) and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class AdapterReport:
    """What a checkpoint says and how the base takes it. `notes` had no effect on the answer.

    `prefix_tokens` and `virtual_tokens` are positions before the prompt, with keys and values of
    their own and with embeddings of their own. `merged_bytes` is what merged weights take of one
    that can only be served so.
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
    """A stored adapter. `created` is False when the name already pointed to this content."""

    adapter: Adapter
    report: AdapterReport
    created: bool


@dataclass(frozen=True)
class Validation:
    """The answer to a dry run: `report.refusals` says why a checkpoint is not valid."""

    valid: bool
    report: AdapterReport
