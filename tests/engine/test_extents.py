from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.extents import ALIGNMENT, ExtentAllocator


def test_takes_the_first_hole_that_is_large_enough() -> None:
    arena = ExtentAllocator(6 * ALIGNMENT)
    offsets = [arena.allocate(size * ALIGNMENT) for size in (1, 2, 1, 2)]
    assert offsets == [0, 64, 192, 256]
    arena.free(0)
    arena.free(192)
    assert arena.allocate(2 * ALIGNMENT) is None
    assert arena.allocate(ALIGNMENT) == 0
    assert arena.allocate(1) == 192


def test_neighbouring_holes_are_one() -> None:
    arena = ExtentAllocator(3 * ALIGNMENT)
    for _ in range(3):
        arena.allocate(ALIGNMENT)
    arena.free(0)
    arena.free(128)
    assert not arena.fits(2 * ALIGNMENT)
    assert arena.fits(2 * ALIGNMENT, without={64})
    arena.free(64)
    assert arena.allocate(3 * ALIGNMENT) == 0


def test_sizes_are_rounded_up_and_the_range_down() -> None:
    arena = ExtentAllocator(2 * ALIGNMENT + 63)
    assert arena.capacity == 2 * ALIGNMENT
    assert arena.allocate(ALIGNMENT + 1) == 0
    assert arena.used == 2 * ALIGNMENT
    assert not arena.could_hold(2 * ALIGNMENT + 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 500)), max_size=60))
def test_extents_never_overlap_and_bytes_balance(moves: list[tuple[bool, int]]) -> None:
    arena = ExtentAllocator(2000)
    offsets: list[int] = []
    for allocates, number in moves:
        if allocates:
            fits = arena.fits(number)
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


def test_a_byte_budget_only_counts() -> None:
    budget = ByteBudget(100)
    first, second = budget.allocate(40), budget.allocate(50)
    assert first is not None
    assert second is not None
    assert budget.allocate(11) is None
    assert budget.fits(60, without={second})
    assert not budget.fits(61, without={second})
    budget.free(first)
    assert budget.used == 50
    budget.check_integrity([second])
    with pytest.raises(AssertionError):
        budget.check_integrity([first])
