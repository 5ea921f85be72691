"""Report: how the base applies a checkpoint, or why it cannot. Mirrors AdapterReport."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from adaplex.adapters.errors import Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram, TensorRole
from adaplex.adapters.program.sum import bottleneck_kind
from adaplex.adapters.program.traits import NO_TRAITS, AdapterTraits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """Effect of an adapter on one module; rank 0 without a low-rank pair."""

    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    bias: bool
    primitives: tuple[str, ...] = ()
    """Names of the primitives applied to the module."""
    bottleneck: str = ""
    """Input and activation of the bottleneck; empty without one."""
    sizes: tuple[tuple[TensorRole, int], ...] = ()
    """Number of elements of each packed tensor."""


@dataclass(frozen=True)
class Report:
    """Result of checking an adapter, in a dry run or an upload. Valid only without refusals."""

    family: str = ""
    digest: str = ""
    modules: tuple[ModuleReport, ...] = ()
    packed_bytes: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Reasons why the answers may differ from what the adapter's author meant."""
    prefix_tokens: int = 0
    """Positions of the KV prefix, before the prompt."""
    virtual_tokens: int = 0
    """Virtual tokens, between the KV prefix and the prompt."""
    traits: AdapterTraits = NO_TRAITS
    merged_bytes: int = 0
    """Upper bound of the bytes of its merged weights; 0 if it can be served unmerged."""

    @property
    def valid(self) -> bool:
        """True if the adapter can be served."""
        return not self.refusals


def describe(program: AdapterProgram, base: BaseSpec, element_bytes: int) -> Report:
    """Returns the report of an adapter that can be served."""
    sizes: defaultdict[str, list[tuple[TensorRole, int]]] = defaultdict(list)
    order = {name: number for number, name in enumerate(base.modules)}
    for place in program.layout(element_bytes, order):
        sizes[place.module].append((place.role, math.prod(place.shape)))
    modules = tuple(
        ModuleReport(
            module=module.module,
            rank=0 if module.low_rank is None else module.low_rank.rank,
            scale=module.scale,
            in_features=base.modules[module.module].in_features,
            out_features=base.modules[module.module].out_features,
            bias=module.bias is not None,
            primitives=_shared(module.primitives),
            bottleneck=bottleneck_kind(module.bottleneck),
            sizes=_shared(tuple(sizes[module.module])),
        )
        for module in program.modules
    )
    packed = program.packed_bytes(element_bytes)
    merged = _merged_bytes(program, base, element_bytes) if program.traits.merged_only else 0
    return Report(
        program.family,
        program.digest,
        modules,
        packed,
        notes=program.notes,
        warnings=program.warnings,
        prefix_tokens=program.prefix_tokens,
        virtual_tokens=program.virtual_tokens,
        traits=program.traits,
        merged_bytes=merged,
    )


def _merged_bytes(program: AdapterProgram, base: BaseSpec, element_bytes: int) -> int:
    """Returns bytes of dense weights for all linears, and of packed tensors for other modules."""
    linears = [m for p in program.modules if (m := base.modules[p.module]).kind == "linear"]
    rest = tuple(p for p in program.modules if base.modules[p.module].kind != "linear")
    dense = sum(linear.out_features * linear.in_features for linear in linears)
    return dense * element_bytes + replace(program, modules=rest).packed_bytes(element_bytes)


@lru_cache(maxsize=4096)
def _shared(value: T) -> T:
    """Returns one object for all equal values, since the modules of cached reports are alike."""
    return value


class ReportCache:
    """LRU cache of reports by digest. Not thread-safe: callers hold a lock."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._reports: OrderedDict[str, Report] = OrderedDict()

    def get(self, digest: str) -> Report | None:
        """Returns the report, or None if it is not cached."""
        if digest in self._reports:
            self._reports.move_to_end(digest)
        return self._reports.get(digest)

    def put(self, report: Report) -> None:
        """Adds a report, evicting the least recently used one if the cache is full."""
        self._reports[report.digest] = report
        self._reports.move_to_end(report.digest)
        if len(self._reports) > self._capacity:
            self._reports.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Removes a report, if it is cached."""
        self._reports.pop(digest, None)

    def __len__(self) -> int:
        return len(self._reports)
