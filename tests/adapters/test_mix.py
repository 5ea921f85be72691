"""Mixes: their canonical form, their digest, and the sums of their programs."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaplex.adapters.compose.mix import Component, Mix, mix_packed_bytes, mix_ranks, mixed_program
from adaplex.adapters.digest import PATTERN
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.adapters.program.report import describe
from adapters.handmade import BASE, DOWN, NORM, QUERY, VALUE

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def of(*parts: tuple[str, float]) -> Mix:
    return Mix.of(Component(*part) for part in parts)


def module(name: str, rank: int, *, bias: bool = False, seed: int = 0) -> ModuleProgram:
    """Random primitives; rank 0 is no pair."""
    generator = torch.Generator().manual_seed(seed)
    spec = BASE.modules[name]
    pair = LowRank(
        torch.randn(rank, spec.in_features, generator=generator),
        torch.randn(spec.out_features, rank, generator=generator),
    )
    added = torch.randn(spec.out_features, generator=generator) if bias else None
    return ModuleProgram(name, pair if rank else None, added, scale=2.0)


def program(digest: str, *modules: ModuleProgram, **fields: tuple[str, ...]) -> AdapterProgram:
    return AdapterProgram(digest, "lora", tuple(sorted(modules, key=lambda m: m.module)), **fields)


def delta(program: AdapterProgram, name: str) -> torch.Tensor:
    """[out, in] that the program adds to a module's weight."""
    spec = BASE.modules[name]
    found = {m.module: m.low_rank for m in program.modules}.get(name)
    return torch.zeros(spec.out_features, spec.in_features) if found is None else found.b @ found.a


def bias(program: AdapterProgram, name: str) -> torch.Tensor:
    """[out] that the program adds to a module's output."""
    found = {m.module: m.bias for m in program.modules}.get(name)
    return torch.zeros(BASE.modules[name].out_features) if found is None else found


def test_the_canonical_form_is_sorted_and_summed_without_zeros() -> None:
    mix = of((B, 0.5), (A, 1.0), (C, 2.0), (B, 0.25), (C, -2.0), (A, 0.0))
    assert mix.components == (Component(A, 1.0), Component(B, 0.75))
    assert mix == of((A, 1.0), (B, 0.75))
    assert mix.digest == of((B, 0.75), (A, 1.0)).digest


def test_sums_do_not_depend_on_the_order() -> None:
    weights = [0.1, 0.7, -0.3, 1e-17]
    assert of(*((A, w) for w in weights)) == of(*((A, w) for w in reversed(weights)))


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(A, 0.1)] * 9,
        [(A, math.nan)],
        [(A, math.inf), (B, 1.0)],
        [(A, -10.5)],
        [(A, 6.0), (A, 5.0)],
        [(A, 0.0), (B, -0.0)],
        [(A, 1.0), (A, -1.0)],
    ],
    ids=["none", "nine", "nan", "infinity", "below", "sum-above", "zeros", "cancelled"],
)
def test_what_cannot_be_mixed_is_refused(parts: list[tuple[str, float]]) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        of(*parts)
    assert refused.value.field == "adapters"


def test_the_limits_themselves_are_accepted() -> None:
    assert len(of(*((f"sha256:{i:064x}", 1.0) for i in range(8))).components) == 8
    assert of((A, 10.0), (B, -10.0)).components == (Component(A, 10.0), Component(B, -10.0))


def test_identity_is_contents_and_weights() -> None:
    different = [
        of((A, 1.0)),
        of((A, -1.0)),
        of((A, math.nextafter(1.0, 2.0))),
        of((B, 1.0)),
        of((A, 1.0), (B, 1.0)),
        of((A, 1.0), (B, 0.5)),
        of((A, 0.5), (B, 1.0)),
    ]
    digests = {mix.digest for mix in different}
    assert len(digests) == len(different)
    assert A not in digests
    assert all(map(PATTERN.fullmatch, digests))


def test_identity_is_hashed_under_a_tag_of_its_own() -> None:
    parts = b"".join(
        struct.pack("<Q", len(digest)) + digest.encode() + struct.pack("<d", weight)
        for digest, weight in ((A, 0.5), (B, -2.0))
    )
    tagged = hashlib.sha256(b"adaplex-combination-v1" + parts).hexdigest()
    assert of((A, 0.5), (B, -2.0)).digest == f"sha256:{tagged}"


def test_alone_is_one_component_of_weight_one() -> None:
    assert of((A, 1.0)).alone == A
    assert of((A, 0.25), (A, 0.75), (B, 0.0)).alone == A
    assert of((A, 0.5)).alone is None
    assert of((A, 1.0), (B, 1.0)).alone is None


def test_a_mix_is_the_weighted_sum_of_deltas_and_biases() -> None:
    programs = [
        program(A, module(QUERY, 2, bias=True, seed=1), module(VALUE, 3, seed=2)),
        program(B, module(QUERY, 5, bias=True, seed=3), module(DOWN, 1, seed=4)),
        program(C, module(QUERY, 0, bias=True, seed=5), module(NORM, 0, bias=True, seed=6)),
    ]
    weights = [0.7, -1.5, 2.0]
    made = mixed_program(of((A, 0.7), (B, -1.5), (C, 2.0)), programs, BASE)
    assert [m.module for m in made.modules] == sorted([QUERY, VALUE, DOWN, NORM])
    assert {m.module: m.low_rank and m.low_rank.rank for m in made.modules} == {
        QUERY: 7,
        VALUE: 3,
        DOWN: 1,
        NORM: None,
    }
    for name in (QUERY, VALUE, DOWN):
        expected = sum(w * delta(p, name) for w, p in zip(weights, programs, strict=True))
        torch.testing.assert_close(delta(made, name), expected)
    for name in (QUERY, NORM):
        expected = sum(w * bias(p, name) for w, p in zip(weights, programs, strict=True))
        torch.testing.assert_close(bias(made, name), expected)


def test_the_program_says_what_it_is() -> None:
    mix = of((A, 0.5), (B, 0.5))
    first = program(A, module(QUERY, 1), notes=("same", "first"), warnings=("other base",))
    second = program(B, module(QUERY, 1), notes=("same",), warnings=("other base", "late"))
    made = mixed_program(mix, [first, second], BASE)
    assert (made.digest, made.family, made.traits.max_rank) == (mix.digest, "combination", 2)
    assert (made.notes, made.warnings) == (("same", "first"), ("other base", "late"))
    assert [m.scale for m in made.modules] == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_are_weighted_in_fp32(dtype: torch.dtype) -> None:
    whole = module(QUERY, 2, bias=True)
    assert whole.low_rank is not None
    assert whole.bias is not None
    a, b = whole.low_rank.a.to(dtype), whole.low_rank.b.to(dtype)
    half = ModuleProgram(QUERY, LowRank(a, b), whole.bias.to(dtype))
    made = mixed_program(of((A, 0.3)), [program(A, half)], BASE).modules[0]
    assert made.low_rank is not None
    assert made.bias is not None
    assert {t.dtype for _, t in made.tensors()} == {torch.float32}
    assert torch.equal(made.low_rank.a, a.float())
    assert torch.equal(made.low_rank.b, 0.3 * b.float())


def test_components_are_left_as_they_were() -> None:
    source = module(QUERY, 2, bias=True)
    before = [tensor.clone() for _, tensor in source.tensors()]
    made = mixed_program(of((A, 3.0)), [program(A, source)], BASE)
    for (_, tensor), kept, (_, mixed) in zip(
        source.tensors(), before, made.modules[0].tensors(), strict=True
    ):
        assert torch.equal(tensor, kept)
        mixed.zero_()
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("role", ["b", "bias"])
def test_a_weight_that_makes_a_tensor_overflow_is_refused(role: str) -> None:
    whole = module(QUERY, 2, bias=True)
    assert whole.low_rank is not None
    assert whole.bias is not None
    if role == "b":
        whole = replace(whole, low_rank=LowRank(whole.low_rank.a, whole.low_rank.b * 0 + 1e38))
    else:
        whole = replace(whole, bias=whole.bias * 0 + 1e38)
    assert mixed_program(of((A, 2.0)), [program(A, whole)], BASE).traits.max_rank == 2
    with pytest.raises(AdapterInvalid) as refused:
        mixed_program(of((A, 10.0)), [program(A, whole)], BASE)
    assert [(r.where, role in r.reason) for r in refused.value.refusals] == [(QUERY, True)]


shapes = st.dictionaries(
    st.sampled_from([QUERY, VALUE, DOWN, NORM]),
    st.tuples(st.integers(0, 9), st.booleans()).filter(any),
    min_size=1,
)


@given(st.lists(shapes, min_size=1, max_size=8), st.sampled_from([2, 4]))
def test_reports_are_enough_to_know_the_size(
    shapes: list[dict[str, tuple[int, bool]]], element_bytes: int
) -> None:
    programs = [
        program(
            f"sha256:{i:064x}",
            *(module(name, rank, bias=bias) for name, (rank, bias) in shape.items()),
        )
        for i, shape in enumerate(shapes)
    ]
    made = mixed_program(of(*((p.digest, 0.5) for p in programs)), programs, BASE)
    reports = [describe(p, BASE, element_bytes) for p in programs]
    assert mix_packed_bytes(reports, element_bytes) == made.packed_bytes(element_bytes)
    ranks = mix_ranks(reports)
    assert max(ranks.values()) == made.traits.max_rank
    assert ranks == {m.module: m.low_rank.rank if m.low_rank else 0 for m in made.modules}
