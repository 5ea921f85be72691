"""Mix: several weighted adapters of any families in one request, as their exact sum."""

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
from adaplex.adapters.program.sum import Effect, conflict, sum_programs

MAX_COMPONENTS = 8
MAX_WEIGHT = 10.0
"""Largest absolute weight of an adapter."""
CONCATENATED: frozenset[TensorRole] = frozenset(["a", "b"])
"""Roles whose tensors are concatenated; tensors of other roles are added."""


@dataclass(frozen=True)
class Component:
    """Digest and weight of one adapter in a mix."""

    digest: str
    weight: float


@dataclass(frozen=True)
class Mix:
    """Adapters in canonical form: sorted by digest, each once, no weight zero. Mixes with equal
    digests and weights are equal.
    """

    components: tuple[Component, ...]

    @classmethod
    def of(cls, components: Iterable[Component]) -> Mix:
        """Returns the mix in canonical form. Raises AdapterInvalid naming `adapters`."""
        given = tuple(components)
        if not 1 <= len(given) <= MAX_COMPONENTS:
            reason = f"must be 1 to {MAX_COMPONENTS} adapters, not {len(given)}"
            raise AdapterInvalid.because("adapters", reason)
        weights: defaultdict[str, list[float]] = defaultdict(list)
        for component in given:
            weights[component.digest].append(_checked(component.weight))
        totals = {digest: _checked(math.fsum(found)) for digest, found in weights.items()}
        canonical = tuple(Component(d, w) for d, w in sorted(totals.items()) if w != 0.0)
        if not canonical:
            raise AdapterInvalid.because("adapters", "must have a weight other than 0")
        return cls(canonical)

    @property
    def digest(self) -> str:
        """Digest of the mix: SHA-256 of the digests and weights of its components."""
        total = hashlib.sha256(b"adaplex-combination-v1")
        for component in self.components:
            name = component.digest.encode()
            total.update(struct.pack("<Q", len(name)) + name + struct.pack("<d", component.weight))
        return PREFIX + total.hexdigest()

    @property
    def alone(self) -> str | None:
        """Digest of the only adapter, if there is one and its weight is 1; else None."""
        first, *others = self.components
        return first.digest if not others and first.weight == 1.0 else None


def mixed_program(mix: Mix, programs: Sequence[AdapterProgram], base: BaseSpec) -> AdapterProgram:
    """Returns the sum of the components' programs, given in their order, in fp32.

    Raises AdapterInvalid if they cannot be summed, or a weighted tensor overflows bf16.
    """
    pairs = list(zip(mix.components, programs, strict=True))
    assert all(component.digest == program.digest for component, program in pairs)
    terms = [(component.weight, program) for component, program in pairs]
    return sum_programs(terms, base, digest=mix.digest, family="combination")


def check_mix(mix: Mix, reports: Sequence[Report], names: Mapping[str, str]) -> None:
    """Raises AdapterInvalid, naming `adapters`, if the components cannot be mixed. Reads no tensor.

    `reports` describe the components in their order; `names` are the adapters' names by digest.
    """
    effects: defaultdict[str, list[Effect]] = defaultdict(list)
    for component, report in zip(mix.components, reports, strict=True):
        if report.traits.merged_only:
            reason = f"{names[component.digest]} can only be served merged, and by itself"
            raise AdapterInvalid.because("adapters", reason)
        for module in report.modules:
            effect = Effect(component.weight, module.primitives, module.bottleneck)
            effects[module.module].append(effect)
    together = " and ".join(names[component.digest] for component in mix.components)
    # the order of two adapters' virtual tokens would depend on their digests
    if sum(report.virtual_tokens > 0 for report in reports) > 1:
        raise AdapterInvalid.because("adapters", f"{together} all put tokens before the prompt")
    if len({report.traits.invocation for report in reports}) > 1:
        raise AdapterInvalid.because("adapters", f"{together} begin at different invocations")
    for name, found in effects.items():
        if problem := conflict(found):
            reason = f"{together} cannot be combined: {name}: {problem}"
            raise AdapterInvalid.because("adapters", reason)


def mix_packed_bytes(reports: Sequence[Report], element_bytes: int) -> int:
    """Returns the bytes of the packed mix, from one report for each component. Reads no tensor."""
    step = ALIGNMENT // element_bytes
    sizes = (size for module in _modules(reports).values() for size in _elements(module))
    return sum(-(-size // step) * step for size in sizes) * element_bytes


def mix_ranks(reports: Sequence[Report]) -> dict[str, int]:
    """Returns the rank of the mix at each module; 0 without low-rank pairs."""
    return {name: sum(m.rank for m in found) for name, found in _modules(reports).items()}


def _modules(reports: Sequence[Report]) -> dict[str, list[ModuleReport]]:
    found: defaultdict[str, list[ModuleReport]] = defaultdict(list)
    for report in reports:
        for module in report.modules:
            found[module.module].append(module)
    return found


def _elements(modules: Sequence[ModuleReport]) -> list[int]:
    """Returns the number of elements of each tensor of the mix at one module."""
    sizes = [dict(module.sizes) for module in modules]
    total = {role: max(found.get(role, 0) for found in sizes) for role in set().union(*sizes)}
    for role in CONCATENATED & total.keys():
        total[role] = sum(found.get(role, 0) for found in sizes)
    if "inner" in total:  # includes zeros for bottlenecks without a down bias
        total["inner"] = total["a"] // modules[0].in_features
    return list(total.values())


def _checked(weight: float) -> float:
    """Returns the weight. Raises AdapterInvalid if it is out of range."""
    if not abs(weight) <= MAX_WEIGHT:  # also true for NaN
        reason = f"a weight must be in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}], not {weight:g}"
        raise AdapterInvalid.because("adapters", reason)
    return weight
