"""Adapters that put positions before the prompt."""

from __future__ import annotations

import pytest

from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import AdapterRef, SamplingParams
from adaplex.engine.sequence import VIRTUAL, Sequence
from engine.fakes import (
    Ledger,
    make_adapter,
    make_engine,
    make_request,
    recomputed,
    run_all,
    run_rows,
)

TUNED = make_adapter("tuned", leading=10)
"""Its positions fill two and a half blocks."""


def test_the_prompt_begins_behind_them_and_the_output_behind_the_prompt() -> None:
    sequence = Sequence(make_request(prompt=(5, 6), adapter=TUNED))
    assert sequence.tokens == [*range(VIRTUAL, VIRTUAL + 10), 5, 6]
    assert (sequence.prompt_len, sequence.output_len, sequence.output) == (2, 0, [])
    sequence.tokens.append(7)
    assert (sequence.prompt_len, sequence.output_len, sequence.output) == (2, 1, [7])
    assert not sequence.decoding
    sequence.computed = 12
    assert sequence.decoding


def test_a_second_request_computes_none_of_the_whole_blocks_that_it_shares() -> None:
    engine, runner = make_engine()
    run_all(engine, [make_request("first", (1, 2, 3), TUNED)])
    before = len(runner.batches)
    ledger = run_all(engine, [make_request("second", (4, 5, 6), TUNED)])
    first = runner.batches[before][0]
    assert (first.start, first.length) == (8, 5)
    timing = ledger.last("second").timing
    assert timing is not None
    assert timing.cached_tokens == 0, "what is cached is no part of the prompt"


def test_positions_that_fill_their_blocks_are_computed_once() -> None:
    engine, runner = make_engine()
    whole = make_adapter("whole", leading=12)
    run_all(engine, [make_request(f"r{i}", (i, 2, 3, 4, 5), whole) for i in range(3)])
    rows = run_rows(engine, runner, make_request("later", (2, 2, 3, 4, 5), whole))
    assert rows[0].start == 16, "all of the adapter, and a block of the prompt"


@pytest.mark.parametrize("other", [make_adapter("other", leading=10), make_adapter("plain"), None])
def test_they_are_shared_with_no_other_adapter(other: AdapterRef | None) -> None:
    engine, runner = make_engine()
    run_all(engine, [make_request("first", (1, 2, 3), TUNED)])
    assert run_rows(engine, runner, make_request("second", (1, 2, 3), other))[0].start == 0


def test_salts_keep_them_apart() -> None:
    engine, runner = make_engine()
    run_all(engine, [make_request("first", (1, 2, 3), TUNED, cache_salt="mine")])
    second = make_request("second", (1, 2, 3), TUNED, cache_salt="yours")
    assert run_rows(engine, runner, second)[0].start == 0


def test_they_are_cut_into_chunks_and_survive_preemption() -> None:
    engine, runner = make_engine(num_blocks=17, max_chunk_tokens=3, max_running=4)
    requests = [
        make_request(f"r{i}", range(i, i + 9), TUNED if i % 2 else "a", max_tokens=30)
        for i in range(6)
    ]
    run_all(engine, requests)
    assert recomputed(runner) & {"r1", "r3", "r5"}, "no request with positions was preempted"


def test_usage_counts_tokens_of_the_prompt_alone() -> None:
    engine, _ = make_engine()
    prompt = (1, 2, 3, 4, 5, 6, 7)
    run_all(engine, [make_request("first", prompt, TUNED)])
    ledger = run_all(engine, [make_request("second", prompt, TUNED, max_tokens=2)])
    last = ledger.last("second")
    assert last.timing is not None
    assert last.timing.cached_tokens == 16 - 10


def test_a_stop_token_does_not_count_before_min_tokens_behind_them() -> None:
    engine, _ = make_engine()
    everything = frozenset(range(1000))
    sampling = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=everything)
    engine.add(make_request(adapter=TUNED, sampling=sampling))
    ledger = Ledger(engine)
    ledger.drain()
    assert len(ledger.tokens("r")) == 4


def test_they_count_towards_the_context() -> None:
    engine, _ = make_engine(max_model_len=16)
    ledger = Ledger(engine)
    engine.add(make_request("fits", range(5), TUNED, max_tokens=9))
    ledger.drain()
    assert len(ledger.tokens("fits")) == 1
    with pytest.raises(RequestInvalid, match=r"6 tokens behind the 10 of adapter tuned.* 16") as no:
        engine.add(make_request("long", range(6), TUNED))
    assert no.value.field == "prompt"
