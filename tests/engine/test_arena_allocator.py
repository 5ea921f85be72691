from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.arena_allocator import ALIGNMENT, ArenaAllocator
from adaplex.engine.byte_budget import ByteBudget


def test_takes_the_first_hole_that_is_large_enough() -> None:
    arena = ArenaAllocator(6 * ALIGNMENT)
    offsets = [arena.allocate(size * ALIGNMENT) for size in (1, 2, 1, 2)]
    assert offsets == [0, 64, 192, 256]
    arena.free(0)
    arena.free(192)
    assert arena.allocate(2 * ALIGNMENT) is None
    assert arena.allocate(ALIGNMENT) == 0
    assert arena.allocate(1) == 192


def test_neighbouring_holes_are_one() -> None:
    arena = ArenaAllocator(3 * ALIGNMENT)
    for _ in range(3):
        arena.allocate(ALIGNMENT)
    arena.free(0)
    arena.free(128)
    assert arena.victims(2 * ALIGNMENT, {}) is None
    assert arena.victims(2 * ALIGNMENT, {64: 1.0}) == [64]
    assert arena.victims(ALIGNMENT, {64: 1.0}) == []
    arena.free(64)
    assert arena.allocate(3 * ALIGNMENT) == 0


def test_sizes_are_rounded_up_and_the_range_down() -> None:
    arena = ArenaAllocator(2 * ALIGNMENT + 63)
    assert arena.capacity == 2 * ALIGNMENT
    assert arena.allocate(ALIGNMENT + 1) == 0
    assert arena.used == 2 * ALIGNMENT
    assert not arena.fits_empty(2 * ALIGNMENT + 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 500)), max_size=60))
def test_extents_never_overlap_and_bytes_balance(moves: list[tuple[bool, int]]) -> None:
    arena = ArenaAllocator(2000)
    offsets: list[int] = []
    for allocates, number in moves:
        if allocates:
            fits = arena.victims(number, {}) == []
            offset = arena.allocate(number)
            assert (offset is not None) == fits
            if offset is not None:
                offsets.append(offset)
        elif offsets:
            arena.free(offsets.pop(number % len(offsets)))
        arena.check_integrity(offsets)
    for offset in offsets:
        arena.free(offset)
    assert arena.used == 0
    assert arena.allocate(arena.capacity) == 0


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=10),
    freed=st.sets(st.integers(0, 9)),
    held=st.sets(st.integers(0, 9)),
    prices=st.lists(st.integers(0, 5), min_size=10, max_size=10),
    wanted=st.integers(1, 1500),
)
def test_the_cheapest_neighbours_make_room(
    sizes: list[int], freed: set[int], held: set[int], prices: list[int], wanted: int
) -> None:
    arena = ArenaAllocator(1280)
    offsets = [arena.allocate(size) for size in sizes]
    there = [
        (i, offset) for i, offset in enumerate(offsets) if offset is not None and i not in freed
    ]
    for i in freed:
        if i < len(offsets) and (offset := offsets[i]) is not None:
            arena.free(offset)
    priced = {offset: float(prices[i]) for i, offset in there if i not in held}
    chosen = arena.victims(wanted, priced)

    def makes_room(gone: tuple[int, ...]) -> bool:
        return arena.victims(wanted, dict.fromkeys(gone, 0.0)) is not None

    possible = [
        sum(priced[offset] for offset in gone)
        for count in range(len(priced) + 1)
        for gone in combinations(priced, count)
        if makes_room(gone)
    ]
    assert (chosen is None) == (not possible)
    if chosen is not None:
        assert sum(priced[offset] for offset in chosen) == min(possible)
        for offset in chosen:
            arena.free(offset)
        assert arena.allocate(wanted) is not None


def test_a_byte_budget_gives_up_the_cheapest_first() -> None:
    budget = ByteBudget(100)
    handles = [budget.allocate(25) for _ in range(4)]
    prices = {h: price for h, price in zip(handles, (3.0, 1.0, 2.0, 0.5), strict=True) if h}
    assert budget.victims(30, prices) == [handles[3], handles[1]]


def test_a_byte_budget_only_counts() -> None:
    budget = ByteBudget(100)
    first, second = budget.allocate(40), budget.allocate(50)
    assert first is not None
    assert second is not None
    assert budget.allocate(11) is None
    assert budget.victims(60, {second: 1.0}) == [second]
    assert budget.victims(61, {second: 1.0}) is None
    assert budget.victims(10, {second: 1.0}) == []
    budget.free(first)
    assert budget.used == 50
    budget.check_integrity([second])
    with pytest.raises(AssertionError):
        budget.check_integrity([first])
