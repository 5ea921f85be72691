"""Packed adapters and the host cache: a copy from it is the adapter, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaplex.adapters.program.program import AdapterProgram
from adaplex.model.adapters.packing import HostCache, Packer
from model.spread_adapters import spread_adapters
from rig import ModelRig, prompt


@pytest.fixture
def rig(tiny_model: Callable[[str], Path]) -> ModelRig:
    return ModelRig(tiny_model("llama"))


@pytest.fixture
def programs(rig: ModelRig, tiny_model: Callable[[str], Path]) -> list[AdapterProgram]:
    adapters = spread_adapters(tiny_model("llama"), rig.base.spec, "llama")
    return [adapter.program for adapter in adapters.values()]


def test_a_packed_adapter_is_its_program_packed(
    rig: ModelRig, programs: list[AdapterProgram]
) -> None:
    dtype = rig.base.dtype
    for program in programs:
        packed = Packer(rig.base.spec.modules, dtype).pack(program)
        assert packed.flat.nbytes == program.packed_bytes(dtype.itemsize)
        tensors = {
            (m.module, role): tensor for m in program.modules for role, tensor in m.tensors()
        }
        for place in packed.layout:
            tensor = tensors.pop((place.module, place.role))
            there = packed.flat[place.offset : place.offset + tensor.numel()]
            assert torch.equal(there, tensor.to(dtype).reshape(-1))
        assert not tensors


def test_what_a_step_reads_is_packed_in_its_order(
    rig: ModelRig, programs: list[AdapterProgram]
) -> None:
    order = list(rig.base.spec.modules)
    for program in programs:
        layout = Packer(rig.base.spec.modules, rig.base.dtype).pack(program).layout
        assert [p.offset for p in layout] == sorted(p.offset for p in layout)
        roles = [place.role for place in layout]
        first = roles.count("a")
        assert set(roles[:first]) == {"a"}, (
            "every shrink of a step reads on where the last one ended"
        )
        for part in (layout[:first], layout[first:]):
            places = [order.index(place.module) for place in part]
            assert places == sorted(places)


def test_logits_are_the_same_by_way_of_the_host(
    rig: ModelRig, programs: list[AdapterProgram]
) -> None:
    for seed, program in enumerate(programs):
        direct = rig.add(program)
        sequence = rig.sequence(prompt(17, seed), direct)
        before = rig.prefill(sequence)
        rig.runner.remove_adapter(program.digest)
        rig.runner.pack_adapter(program)
        again, size = rig.sequence(prompt(17, seed), direct), direct.packed_bytes
        rig.runner.copy_adapter(program.digest, 32 << 20, size)
        rig.runner.remove_host(program.digest)
        assert torch.equal(rig.prefill(again), before), "the arena needs no host copy"
        base = rig.prefill(rig.sequence(prompt(17, seed)))
        assert not torch.equal(before, base)
        rig.runner.remove_adapter(program.digest)


def test_packing_that_fails_keeps_nothing(rig: ModelRig, programs: list[AdapterProgram]) -> None:
    nowhere = tuple(replace(module, module="nowhere") for module in programs[0].modules)
    with pytest.raises(KeyError, match="nowhere"):
        rig.runner.pack_adapter(replace(programs[0], modules=nowhere))
    assert rig.runner._host.get(programs[0].digest) is None


def test_a_removed_copy_is_forgotten(rig: ModelRig, programs: list[AdapterProgram]) -> None:
    copies = HostCache()
    packed = Packer(rig.base.spec.modules, torch.float32).pack(programs[0])
    copies.store(packed)
    assert copies.get(packed.digest) is packed
    copies.remove(packed.digest)
    assert copies.get(packed.digest) is None
