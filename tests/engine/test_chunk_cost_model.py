"""Chunks below a block: their modelled seconds, and the sizes chosen by them."""

from __future__ import annotations

import pytest

from adaplex.engine.chunk_cost_model import MIN_CHUNK, RECENT, SmallChunkCosts

BLOCK = 16
CHUNK, TOKEN = 2.5, 0.5
"""Seconds that a chunk takes, and that each of its tokens adds."""


def measured(*sizes: int, chunk: float = CHUNK, token: float = TOKEN) -> SmallChunkCosts:
    """Returns the costs learned from chunks of these sizes."""
    small = SmallChunkCosts()
    for size in sizes:
        small.record(size, chunk + size * token)
    return small


def test_while_nothing_is_known_a_block_is_taken() -> None:
    assert SmallChunkCosts().size(BLOCK, 1e-9) == BLOCK


def test_one_size_is_taken_for_tokens_alone_and_a_second_tells_them_apart() -> None:
    small = measured(16)
    assert small.seconds(8) == pytest.approx(0.5 * (CHUNK + 16 * TOKEN))
    small.record(8, CHUNK + 8 * TOKEN)
    for size in (2, 4, 12, 16, 32):
        assert small.seconds(size) == pytest.approx(CHUNK + size * TOKEN)


def test_one_that_is_far_out_changes_nothing() -> None:
    small = measured(16, 8, 16, 8, 16, 16, 16)
    before = small.seconds(4)
    small.record(8, 500.0)
    small.record(16, 500.0)
    assert small.seconds(4) == pytest.approx(before)


def test_a_usual_size_is_one_that_came_twice_in_a_row() -> None:
    small = measured(16, 16, 4, 4)
    for seconds in (9.0, 9.0, 9.0):
        small.record(4, seconds)
    assert small.seconds(4) == 9.0


@pytest.mark.parametrize(
    ("seconds", "size"),
    [(20.0, 16), (10.5, 16), (7.5, 8), (5.0, 8), (4.2, 4), (3.1, 4), (2.4, 2), (2.2, 8)],
)
def test_the_largest_that_is_bearable_unless_half_takes_much_less(
    seconds: float, size: int
) -> None:
    """16, 8, 4 and 2 tokens take 10.5, 6.5, 4.5 and 3.5 seconds; 1.5 times the seconds to be spent
    are bearable, and of all halves only that of 16 takes less than two thirds of the whole.
    """
    assert measured(16, 16, 8, 16).size(BLOCK, seconds) == size


def test_where_the_chunk_itself_takes_too_long_it_is_not_made_small() -> None:
    assert measured(16, 16, 8, 16, chunk=40.0).size(BLOCK, 10.0) == BLOCK


def test_a_chunk_grows_to_twice_the_usual_at_most() -> None:
    small = measured(16, 4, 4, 2, 4)
    small._tokens.clear()
    small._tokens.append(0.0)
    assert small.size(BLOCK, 3.0) == 8


def test_a_trial_is_of_another_size_and_not_beyond_what_is_bearable() -> None:
    small = measured(16, 8, 16)
    assert small.size(BLOCK, 20.0, trial=True) == 8
    small = measured(4, 2, 2, token=2.0)
    assert small.size(BLOCK, 7.0, trial=True) == 2 * MIN_CHUNK
    assert small.size(BLOCK, 6.8, trial=True) == MIN_CHUNK


def test_what_became_cheaper_is_seen_within_a_few_trials() -> None:
    small = measured(*[16] * RECENT, 8, 16, chunk=40.0)
    assert small.size(BLOCK, 10.0) == BLOCK
    for _ in range(RECENT):
        small.record(8, CHUNK + 8 * TOKEN)
        small.record(16, CHUNK + 16 * TOKEN)
    assert small.size(BLOCK, 10.0) == 8
