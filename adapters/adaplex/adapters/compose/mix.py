"""Mix: several adapters of any families at once, weighted: exact, see summed.py."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaplex.adapters.digest import PREFIX
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import ALIGNMENT
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram, TensorRole
from adaplex.adapters.program.report import ModuleReport, Report
from adaplex.adapters.program.sum import Effect, conflict, summed

MAX_COMPONENTS = 8
MAX_WEIGHT = 10.0
"""Of one adapter, either way."""
GROWING: frozenset[TensorRole] = frozenset(["a", "b"])
"""Tensors that stand beside each other; of the other roles a module has one."""


@dataclass(frozen=True)
class Component:
    """One adapter's content, and its weight."""

    digest: str
    weight: float


@dataclass(frozen=True)
class Mix:
    """What is combined: by digest, each once, no weight zero. Equal ones are equal values."""

    components: tuple[Component, ...]

    @classmethod
    def of(cls, parts: Iterable[Component]) -> Mix:
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


def mixed_program(
    combination: Mix, programs: Sequence[AdapterProgram], base: BaseSpec
) -> AdapterProgram:
    """One program out of those of the components, given in their order; in fp32.

    Raises AdapterInvalid when they cannot be combined, or a weighted tensor overflows bf16.
    """
    pairs = list(zip(combination.components, programs, strict=True))
    assert all(part.digest == program.digest for part, program in pairs)
    parts = [(part.weight, program) for part, program in pairs]
    return summed(parts, base, digest=combination.digest, family="combination")


def check(combination: Mix, reports: Sequence[Report], names: Mapping[str, str]) -> None:
    """Whether the components that these reports describe can be combined; reads no tensor.

    `names` are those of the adapters, by digest. Raises AdapterInvalid naming `adapters`.
    """
    found: defaultdict[str, list[Effect]] = defaultdict(list)
    for part, report in zip(combination.components, reports, strict=True):
        if report.merged_only:
            reason = f"{names[part.digest]} can only be served merged, and by itself"
            raise AdapterInvalid.because("adapters", reason)
        for module in report.modules:
            effect = Effect(part.weight, module.primitives, module.bottleneck)
            found[module.module].append(effect)
    together = " and ".join(names[part.digest] for part in combination.components)
    # whose tokens came first would depend on digests
    if sum(report.virtual_tokens > 0 for report in reports) > 1:
        raise AdapterInvalid.because("adapters", f"{together} all put tokens before the prompt")
    if len({report.invocation for report in reports}) > 1:
        raise AdapterInvalid.because("adapters", f"{together} begin at different invocations")
    for name, effects in found.items():
        if problem := conflict(effects):
            reason = f"{together} cannot be combined: {name}: {problem}"
            raise AdapterInvalid.because("adapters", reason)


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
    sizes = [dict(module.sizes) for module in modules]
    total = {role: max(found.get(role, 0) for found in sizes) for role in set().union(*sizes)}
    for role in GROWING & total.keys():
        total[role] = sum(found.get(role, 0) for found in sizes)
    if "inner" in total:  # the zeros of those without one, too
        total["inner"] = total["a"] // modules[0].in_features
    return list(total.values())


def _checked(weight: float) -> float:
    """The weight. Raises AdapterInvalid."""
    if not abs(weight) <= MAX_WEIGHT:  # NaN is not, either
        reason = f"a weight must be in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}], not {weight:g}"
        raise AdapterInvalid.because("adapters", reason)
    return weight
