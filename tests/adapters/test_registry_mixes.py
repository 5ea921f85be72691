"""Mixes through the registry: their leases and records."""

from __future__ import annotations

import pytest

from adaplex.adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
)
from adaplex.adapters.registry.registry import AdapterRegistry
from adapters.handmade import (
    UPLOAD,
    push,
)


def test_a_mix_is_leased_as_one_content(registry: AdapterRegistry) -> None:
    push(registry, "a", seed=0)
    push(registry, "b", seed=1)
    with registry.resolve_mix([("a", 0.7), ("b", 0.3)]) as lease:
        record = lease.record
        assert (record.name, record.version, record.family) == ("a+b", 0, "combination")
        assert [(p.record.name, p.weight) for p in lease.parts] == [("a", 0.7), ("b", 0.3)]
        program = registry.programs.program(record.digest)
        assert program.packed_bytes(4) == record.packed_bytes
        assert program.traits.max_rank == record.traits.max_rank == 4
        assert len(program.modules) == record.traits.modules
        with registry.resolve_mix([("b", 0.3), ("a", 0.7)]) as same:
            assert same.record.digest == record.digest
        registry.names.delete("a", UPLOAD)
        assert registry.programs.program(record.digest).digest == record.digest
    with pytest.raises(AdapterNotFound):
        registry.programs.program(record.digest)
    assert registry.leased == 0


def test_a_mix_of_one_with_weight_one_is_that_adapter(registry: AdapterRegistry) -> None:
    digest = push(registry, "a").record.digest
    for parts in ([("a", 1.0)], [("a", 0.25), ("a@1", 0.75)]):
        with registry.resolve_mix(parts) as lease:
            assert lease.record.digest == digest
    assert registry.leased == 0


def test_releasing_a_mix_returns_what_can_leave_the_memory(registry: AdapterRegistry) -> None:
    a, b = (push(registry, name, seed=i).record.digest for i, name in enumerate("ab"))
    lease = registry.resolve_mix([("a", 0.5), ("b", 0.5)])
    registry.names.delete("a", UPLOAD)
    assert set(lease.release()) == {a, lease.record.digest}
    assert registry.programs.program(b).digest == b


@pytest.mark.parametrize(
    "parts", [[("a", float("nan"))], [("a", 11.0)], [("a", 0.0)], [("a", 1.0)] * 9]
)
def test_invalid_mixes(registry: AdapterRegistry, parts: list[tuple[str, float]]) -> None:
    push(registry, "a")
    with pytest.raises(AdapterInvalid):
        registry.resolve_mix(parts)
    with pytest.raises(AdapterNotFound):
        registry.resolve_mix([("a", 0.5), ("nobody", 0.5)])
    assert registry.leased == 0
