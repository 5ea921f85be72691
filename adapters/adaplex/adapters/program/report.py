"""Report: what a checkpoint says and how the base takes it. Mirrors AdapterReport."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from adaplex.adapters.errors import Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram, TensorRole
from adaplex.adapters.program.sum import kind

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What an adapter does to one module; rank 0 when it has no low-rank delta there."""

    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    bias: bool
    primitives: tuple[str, ...] = ()
    """Names of what is applied there."""
    bottleneck: str = ""
    """What the bottleneck reads, and its activation; empty without one."""
    sizes: tuple[tuple[TensorRole, int], ...] = ()
    """Elements of each packed tensor."""


@dataclass(frozen=True)
class Report:
    """The same for a dry run and an upload. Not servable when there is any refusal."""

    family: str = ""
    digest: str = ""
    modules: tuple[ModuleReport, ...] = ()
    packed_bytes: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Why its answers may not be what its author meant."""
    prefix_tokens: int = 0
    """Positions before the prompt whose keys and values are given."""
    virtual_tokens: int = 0
    """Positions before the prompt, behind the prefix, whose embeddings are given."""
    invocation: tuple[int, ...] = ()
    """Tokens from whose last occurrence in the prompt on it is applied; empty: from the start."""
    merged_only: bool = False
    merged_bytes: int = 0
    """Of its merged weights, at most, where it can only be served so."""

    @property
    def leading(self) -> int:
        """Positions before the prompt."""
        return self.prefix_tokens + self.virtual_tokens

    @property
    def valid(self) -> bool:
        """Whether the adapter can be served."""
        return not self.refusals


def describe(program: AdapterProgram, base: BaseSpec, element_bytes: int) -> Report:
    """The report of an adapter that can be served."""
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
            bottleneck=kind(module.bottleneck),
            sizes=_shared(tuple(sizes[module.module])),
        )
        for module in program.modules
    )
    packed = program.packed_bytes(element_bytes)
    return Report(
        program.family,
        program.digest,
        modules,
        packed,
        notes=program.notes,
        warnings=program.warnings,
        prefix_tokens=program.prefix_tokens,
        virtual_tokens=program.virtual_tokens,
        invocation=program.invocation,
        merged_only=program.merged_only,
        merged_bytes=_merged_bytes(program, base, element_bytes) if program.merged_only else 0,
    )


def _merged_bytes(program: AdapterProgram, base: BaseSpec, element_bytes: int) -> int:
    """Bytes with every linear dense, and packed what is at other modules."""
    linears = [m for p in program.modules if (m := base.modules[p.module]).kind == "linear"]
    rest = tuple(p for p in program.modules if base.modules[p.module].kind != "linear")
    dense = sum(linear.out_features * linear.in_features for linear in linears)
    return dense * element_bytes + replace(program, modules=rest).packed_bytes(element_bytes)


@lru_cache(maxsize=4096)
def _shared(value: T) -> T:
    """The first of equal values: many modules have few different ones, and reports are kept."""
    return value


class ReportCache:
    """Reports by digest; those used last stay. Callers hold a lock."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._reports: OrderedDict[str, Report] = OrderedDict()

    def get(self, digest: str) -> Report | None:
        """The report, if it is still here."""
        if digest in self._reports:
            self._reports.move_to_end(digest)
        return self._reports.get(digest)

    def put(self, report: Report) -> None:
        """Keeps a report; the one not used for longest may go for it."""
        self._reports[report.digest] = report
        self._reports.move_to_end(report.digest)
        if len(self._reports) > self._capacity:
            self._reports.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Forgets a report, if it is here."""
        self._reports.pop(digest, None)

    def __len__(self) -> int:
        return len(self._reports)
