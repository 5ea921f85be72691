from __future__ import annotations

import pytest

from adaplex.adapters.program.traits import NO_TRAITS
from adaplex.engine.block_manager import BlockManager, digest_fields
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import Sequence
from engine.fakes import make_adapter, make_config, make_request
from fake_runner import BLOCK


def make_blocks(num_blocks: int = 9, base: str = "base", **changes: object) -> BlockManager:
    return BlockManager(make_config(num_blocks=num_blocks, max_model_len=32, **changes), base)


def make_sequence(
    length: int, adapter: AdapterRef | None = None, salt: str = "", first: int = 0
) -> Sequence:
    prompt = range(first, first + length)
    return Sequence(make_request(prompt=prompt, adapter=adapter, cache_salt=salt))


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.computed = len(sequence)
    blocks.publish(sequence)


def test_blocks_come_back_and_block_zero_never_goes_out() -> None:
    blocks = make_blocks()
    sequences = [make_sequence(16, first=100), make_sequence(16)]
    assert all(blocks.allocate(sequence) for sequence in sequences)
    held = [block for sequence in sequences for block in sequence.blocks]
    assert sorted(held) == list(range(1, 9))
    assert blocks.in_use == 8
    blocks.check_integrity(sequences)
    for sequence in sequences:
        blocks.free(sequence)
    assert blocks.available == 8
    blocks.check_integrity([])


def test_allocate_changes_nothing_when_blocks_or_the_reserve_run_short() -> None:
    blocks = make_blocks()
    sequence = make_sequence(32)
    assert not blocks.allocate(sequence, reserve=1)
    assert sequence.blocks == []
    blocks.check_integrity([])
    assert blocks.allocate(sequence)
    assert not blocks.allocate(make_sequence(1))


def test_extend_adds_a_block_only_at_the_boundary() -> None:
    blocks = make_blocks()
    sequence = make_sequence(BLOCK)
    assert blocks.allocate(sequence)
    assert len(sequence.blocks) == 1
    sequence.tokens.append(7)
    assert blocks.extend(sequence)
    assert blocks.extend(sequence)
    assert len(sequence.blocks) == 2


def test_extend_fails_when_all_blocks_are_held() -> None:
    blocks = make_blocks()
    sequence, other = make_sequence(4), make_sequence(28, first=50)
    assert blocks.allocate(sequence)
    assert blocks.allocate(other)
    sequence.tokens.append(7)
    assert not blocks.extend(sequence)
    blocks.check_integrity([sequence, other])


def test_a_computed_prefix_is_shared_while_held_and_after() -> None:
    blocks = make_blocks()
    first, second, third = (make_sequence(10) for _ in range(3))
    assert blocks.allocate(first)
    assert first.computed == 0
    compute(blocks, first)
    assert blocks.allocate(second)
    assert second.computed == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    blocks.check_integrity([first, second])
    shared = first.blocks[:2]
    blocks.free(first)
    blocks.free(second)
    assert blocks.in_use == 0
    assert blocks.allocate(third)
    assert third.blocks[:2] == shared
    blocks.check_integrity([third])


def test_nothing_is_shared_before_it_is_computed() -> None:
    blocks = make_blocks()
    first, second = make_sequence(10), make_sequence(10)
    assert blocks.allocate(first)
    first.computed = 6
    blocks.publish(first)
    assert blocks.allocate(second)
    assert second.computed == 4


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (32, 28)])
def test_the_last_token_is_always_left_to_compute(length: int, hit: int) -> None:
    blocks = make_blocks(num_blocks=17)
    first, second = make_sequence(length), make_sequence(length)
    assert blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(second)
    assert second.computed == hit


def test_generated_tokens_are_shared_too() -> None:
    blocks = make_blocks()
    first = make_sequence(5)
    assert blocks.allocate(first)
    first.tokens += [90, 91, 92, 93]
    assert blocks.extend(first)
    compute(blocks, first)
    follow_up = Sequence(make_request(prompt=[*first.tokens, 94]))
    assert blocks.allocate(follow_up)
    assert follow_up.computed == 8


def test_the_least_recently_used_block_is_reclaimed_from_the_end_of_its_prefix() -> None:
    blocks = make_blocks()
    old, new = make_sequence(16), make_sequence(16, first=50)
    for sequence in (old, new):
        assert blocks.allocate(sequence)
        compute(blocks, sequence)
        blocks.free(sequence)
    large = make_sequence(12, first=70)
    assert blocks.allocate(large)
    again = make_sequence(17)
    assert blocks.allocate(again)
    assert again.computed == 4
    blocks.check_integrity([large, again])


def test_hits_are_not_reclaimed_for_the_sequence_that_hits_them() -> None:
    blocks = make_blocks()
    first = make_sequence(16)
    assert blocks.allocate(first)
    compute(blocks, first)
    blocks.free(first)
    longer = make_sequence(32)
    assert blocks.allocate(longer)
    assert longer.computed == 16
    assert len(set(longer.blocks)) == 8
    blocks.check_integrity([longer])


def test_two_who_compute_the_same_keep_their_own_blocks() -> None:
    blocks = make_blocks()
    first, second = make_sequence(9), make_sequence(9)
    for sequence in (first, second):
        assert blocks.allocate(sequence)
    for sequence in (first, second):
        compute(blocks, sequence)
    assert not set(first.blocks) & set(second.blocks)
    assert first.hashes == second.hashes
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.free(second)
    blocks.check_integrity([])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((None, ""), (make_adapter("a"), "")),
        ((make_adapter("a"), ""), (make_adapter("b"), "")),
        ((make_adapter("a"), ""), (make_adapter("a", mode=AdapterMode.MERGED), "")),
        ((None, ""), (None, "tenant")),
        ((make_adapter("a"), "b"), (make_adapter("a"), "c")),
        (
            (AdapterRef("n", 1, "b", 1, NO_TRAITS), "a"),
            (AdapterRef("n", 1, "", 1, NO_TRAITS), "ab"),
        ),
        (
            (AdapterRef("n", 1, "ab", 1, NO_TRAITS), ""),
            (AdapterRef("n", 1, "a", 1, NO_TRAITS), "b"),
        ),
    ],
)
def test_prefixes_are_keyed_by_adapter_mode_and_salt(
    one: tuple[AdapterRef | None, str], other: tuple[AdapterRef | None, str]
) -> None:
    blocks = make_blocks(num_blocks=17)
    first, second, same = (make_sequence(9, *who) for who in (one, other, one))
    assert blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(second)
    assert second.computed == 0
    assert blocks.allocate(same)
    assert same.computed == 8


def test_the_prefix_cache_can_be_switched_off() -> None:
    blocks = make_blocks(prefix_cache=False)
    first, second = make_sequence(9), make_sequence(9)
    assert blocks.allocate(first)
    compute(blocks, first)
    blocks.free(first)
    assert blocks.allocate(second)
    assert second.computed == 0


def test_hash_fields_are_tagged_and_length_prefixed() -> None:
    lists: list[tuple[tuple[bytes, bytes], ...]] = [
        ((b"salt", b"a"), (b"adapter", b"b")),
        ((b"salt", b"ab"), (b"adapter", b"")),
        ((b"salt", b""), (b"adapter", b"ab")),
        ((b"adapter", b"a"), (b"salt", b"b")),
        ((b"salta", b""), (b"adapter", b"b")),
        ((b"salt", b"a"),),
    ]
    assert len({digest_fields(*fields) for fields in lists}) == len(lists)


def test_prompts_that_differ_early_share_nothing_later() -> None:
    blocks = make_blocks(num_blocks=17)
    first = Sequence(make_request(prompt=[1, 1, 1, 1, 2, 2, 2, 2, 3]))
    second = Sequence(make_request(prompt=[9, 1, 1, 1, 2, 2, 2, 2, 3]))
    assert blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(second)
    assert second.computed == 0


@pytest.mark.parametrize("position", range(BLOCK))
def test_a_block_is_shared_only_if_every_token_of_it_is_the_same(position: int) -> None:
    blocks = make_blocks()
    first = make_sequence(2 * BLOCK)
    prompt = list(range(2 * BLOCK))
    prompt[BLOCK + position] = 999
    other = Sequence(make_request(prompt=[*prompt, 7]))
    assert blocks.allocate(first)
    compute(blocks, first)
    assert blocks.allocate(other)
    assert other.computed == BLOCK
    assert other.blocks[0] == first.blocks[0]
    assert other.blocks[1] != first.blocks[1]
