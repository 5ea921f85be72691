"""Combination: several adapters at once, weighted: exact, by rank concatenation.

y += sum over i of w_i B_i A_i x is one low-rank delta with the A stacked and the weighted B side by
side, so a combination is lowered, packed and batched like any adapter.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from adaplex.adapters.digest import PREFIX
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.limits import ALIGNMENT
from adaplex.adapters.program import AdapterProgram, LowRank, ModuleProgram
from adaplex.adapters.report import ModuleReport, Report

MAX_COMPONENTS = 8
MAX_WEIGHT = 10.0
"""Of one adapter, either way."""


@dataclass(frozen=True)
class Component:
    """One adapter's content, and its weight."""

    digest: str
    weight: float


@dataclass(frozen=True)
class Combination:
    """What is combined: by digest, each once, no weight zero. Equal ones are equal values."""

    components: tuple[Component, ...]

    @classmethod
    def of(cls, parts: Iterable[Component]) -> Combination:
        """The combination in its canonical form. Raises AdapterInvalid naming `adapters`."""
        given = tuple(parts)
        if not 1 <= len(given) <= MAX_COMPONENTS:
            raise AdapterInvalid.because("adapters", f"must be 1 to {MAX_COMPONENTS} adapters")
        weights: defaultdict[str, list[float]] = defaultdict(list)
        for part in given:
            weights[part.digest].append(_checked(part.weight))
        summed = {digest: _checked(math.fsum(found)) for digest, found in weights.items()}
        components = tuple(Component(d, w) for d, w in sorted(summed.items()) if w != 0.0)
        if not components:
            raise AdapterInvalid.because("adapters", "have no weight other than 0")
        return cls(components)

    @property
    def digest(self) -> str:
        """Identity: SHA-256 of the contents and their weights."""
        total = hashlib.sha256(b"adaplex-combination-v1")
        for part in self.components:
            name = part.digest.encode()
            total.update(struct.pack("<Q", len(name)) + name + struct.pack("<d", part.weight))
        return PREFIX + total.hexdigest()

    @property
    def alone(self) -> str | None:
        """The content that this is nothing but; None for a real combination."""
        first, *others = self.components
        return first.digest if not others and first.weight == 1.0 else None


def combine(combination: Combination, programs: Sequence[AdapterProgram]) -> AdapterProgram:
    """One program out of those of the components, given in their order; in fp32.

    Raises AdapterInvalid when a weighted tensor overflows bf16.
    """
    weighted: defaultdict[str, list[tuple[float, ModuleProgram]]] = defaultdict(list)
    for part, program in zip(combination.components, programs, strict=True):
        assert part.digest == program.digest
        for module in program.modules:
            weighted[module.module].append((part.weight, module))
    modules = tuple(_combined(name, weighted[name]) for name in sorted(weighted))
    refusals = [
        Refusal(module.module, f"its {role}, weighted, overflows")
        for module in modules
        for role, tensor in module.tensors()
        if not bool(torch.isfinite(tensor.to(torch.bfloat16)).all())
    ]
    if refusals:
        raise AdapterInvalid(refusals)
    notes = dict.fromkeys(note for program in programs for note in program.notes)
    warnings = dict.fromkeys(w for program in programs for w in program.warnings)
    return AdapterProgram(combination.digest, "combination", modules, tuple(notes), tuple(warnings))


def packed_bytes(reports: Sequence[Report], element_bytes: int) -> int:
    """Bytes of the packed combination of what these reports, one a component, describe; reads no
    tensor.
    """
    step = ALIGNMENT // element_bytes
    sizes = (size for module in _modules(reports).values() for size in _elements(module))
    return sum(-(-size // step) * step for size in sizes) * element_bytes


def module_ranks(reports: Sequence[Report]) -> dict[str, int]:
    """The rank that the combination has at each module; 0 where it only adds a bias."""
    return {name: sum(m.rank for m in found) for name, found in _modules(reports).items()}


def _modules(reports: Sequence[Report]) -> dict[str, list[ModuleReport]]:
    found: defaultdict[str, list[ModuleReport]] = defaultdict(list)
    for report in reports:
        for module in report.modules:
            found[module.module].append(module)
    return found


def _elements(modules: Sequence[ModuleReport]) -> list[int]:
    """Elements of each tensor that the combination has at one module."""
    rank, first = sum(module.rank for module in modules), modules[0]
    pair = [rank * first.in_features, rank * first.out_features] if rank else []
    return pair + ([first.out_features] if any(module.bias for module in modules) else [])


def _combined(name: str, parts: Sequence[tuple[float, ModuleProgram]]) -> ModuleProgram:
    """The primitives of one module: pairs stacked, biases added."""
    pairs = [(weight, m.low_rank) for weight, m in parts if m.low_rank is not None]
    biases = [weight * m.bias.float() for weight, m in parts if m.bias is not None]
    low_rank = None
    if pairs:
        low_rank = LowRank(
            a=torch.cat([pair.a.float() for _, pair in pairs]),
            b=torch.cat([weight * pair.b.float() for weight, pair in pairs], dim=1),
        )
    return ModuleProgram(name, low_rank, sum(biases[1:], biases[0]) if biases else None)


def _checked(weight: float) -> float:
    """The weight. Raises AdapterInvalid."""
    if not abs(weight) <= MAX_WEIGHT:  # NaN is not, either
        reason = f"a weight must be in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}], not {weight:g}"
        raise AdapterInvalid.because("adapters", reason)
    return weight
