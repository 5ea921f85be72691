"""Adapters that apply from their invocation on; the base computes the rows before it."""

from __future__ import annotations

import pytest

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.merge_cost_model import StepRows
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import Sequence
from engine.fakes import make_adapter, make_engine, make_request, recomputed, run_all, run_rows

INVOKED = make_adapter("invoked", invocation=(7, 8))
OTHER = make_adapter("other", invocation=(8,))


@pytest.mark.parametrize(
    ("prompt", "position"),
    [
        ((7, 8), 0),
        ((1, 7, 8, 2), 1),
        ((7, 8, 1, 7, 8), 3),
        ((7, 7, 8), 1),
        ((7, 8, 7), 0),
        ((8, 7), None),
        ((7,), None),
        ((1, 2, 3), None),
    ],
)
def test_it_applies_from_the_last_invocation_on(
    prompt: tuple[int, ...], position: int | None
) -> None:
    request = make_request(prompt=prompt, adapter=INVOKED)
    assert request.invoked_at == position
    if position is not None:
        assert Sequence(request).adapter_from == position


def test_a_plain_adapter_and_the_base_apply_from_the_start() -> None:
    assert Sequence(make_request(adapter="a")).adapter_from == 0
    assert Sequence(make_request()).adapter_from == 0


def test_a_prompt_without_the_invocation_is_refused() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestInvalid, match="tokens 7, 8, which adapter invoked") as refusal:
        engine.add(make_request(prompt=(8, 7, 1), adapter=INVOKED))
    assert refusal.value.field == "prompt"
    assert not engine.has_work


def test_a_long_invocation_is_named_in_part() -> None:
    engine, _ = make_engine()
    wordy = make_adapter("wordy", invocation=tuple(range(1000)))
    with pytest.raises(RequestInvalid, match=r"tokens 0, .*, 15, \.\.\., which adapter wordy"):
        engine.add(make_request(adapter=wordy))


@pytest.mark.parametrize("first", [None, make_adapter("earlier", invocation=(9,)), OTHER])
@pytest.mark.parametrize("mode", [AdapterMode.UNMERGED, AdapterMode.MERGED])
def test_blocks_before_the_invocation_are_those_of_the_base(
    first: AdapterRef | None, mode: AdapterMode
) -> None:
    """A block of the prompt that contains the invocation is not shared with the base."""
    engine, runner = make_engine(merged_bytes=200)
    shared = tuple(range(20, 30))
    run_all(engine, [make_request("first", (*shared, 9, 8, 1), first)])
    before = len(runner.batches)
    second = make_adapter("invoked", mode=mode, invocation=(7, 8))
    ledger = run_all(engine, [make_request("second", (*shared, 7, 8, 1), second)])
    assert runner.batches[before][0].start == 8
    timing = ledger.last("second").timing
    assert timing is not None
    assert timing.cached_tokens == 8


def test_the_base_shares_what_an_invoked_adapter_has_left_to_it() -> None:
    engine, runner = make_engine()
    run_all(engine, [make_request("first", (*range(20, 28), 7, 8), INVOKED)])
    second = make_request("second", (*range(20, 28), 7, 8))
    assert run_rows(engine, runner, second)[0].start == 8


def test_blocks_from_the_invocation_on_are_shared_with_nobody_else() -> None:
    engine, runner = make_engine()
    prompt = (*range(20, 26), 7, 8, *range(30, 40))

    def first_computed(request_id: str, adapter: AdapterRef | str | None) -> int:
        return run_rows(engine, runner, make_request(request_id, prompt, adapter))[0].start

    assert first_computed("first", INVOKED) == 0
    assert first_computed("base", None) == 4
    assert first_computed("plain", "a") == 0
    assert first_computed("again", INVOKED) == 16


def test_rows_before_the_invocation_count_as_those_of_the_base() -> None:
    sequence = Sequence(make_request(prompt=(1, 2, 3, 7, 8, 4), adapter=INVOKED))
    counts = [Chunk(sequence, start, count).base for start, count in ((0, 2), (2, 3), (3, 3))]
    assert counts == [2, 1, 0]
    assert StepRows.of(Batch((Chunk(sequence, 0, 2),))) == StepRows(base=2)
    rows = StepRows.of(Batch((Chunk(sequence, 0, 6),)))
    assert rows == StepRows(base=3, unmerged={INVOKED.digest: 3})


def test_answers_are_the_same_in_any_chunks_and_after_preemption() -> None:
    engine, runner = make_engine(num_blocks=17, max_chunk_tokens=3, max_running=4)
    adapters = (INVOKED, OTHER, None)
    requests = [
        make_request(f"r{i}", (*range(20, 29), 7, 8, i), adapters[i % 3], max_tokens=30)
        for i in range(8)
    ]
    run_all(engine, requests)
    assert recomputed(runner) - {"r2", "r5"}, "no request with an invocation was preempted"
