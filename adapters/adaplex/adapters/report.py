"""Report: what a checkpoint says and how the base takes it. Mirrors AdapterReport."""

from __future__ import annotations

from dataclasses import dataclass

from adaplex.adapters.errors import Refusal
from adaplex.adapters.program import AdapterProgram, BaseSpec


@dataclass(frozen=True)
class ModuleReport:
    """What an adapter does to one module; rank 0 when it has no low-rank delta there."""

    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class Report:
    """The same for a dry run and an upload. Not servable when there is any refusal."""

    family: str = ""
    digest: str = ""
    modules: tuple[ModuleReport, ...] = ()
    packed_bytes: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the adapter can be served."""
        return not self.refusals


def describe(program: AdapterProgram, base: BaseSpec, element_bytes: int) -> Report:
    """The report of an adapter that can be served."""
    modules = tuple(
        ModuleReport(
            module=module.module,
            rank=0 if module.low_rank is None else module.low_rank.rank,
            scale=module.scale,
            in_features=base.modules[module.module].in_features,
            out_features=base.modules[module.module].out_features,
            bias=module.bias is not None,
        )
        for module in program.modules
    )
    packed = program.packed_bytes(element_bytes)
    return Report(program.family, program.digest, modules, packed, notes=program.notes)
