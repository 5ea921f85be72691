from __future__ import annotations

import time

import pytest

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.engine.errors import QueueFull, RequestInvalid
from adaplex.engine.request import FinishReason, SamplingParams
from engine.fakes import (
    MERGED,
    UNIT,
    Ledger,
    make_adapter,
    make_config,
    make_engine,
    make_request,
    run_all,
)
from fake_runner import expected


def test_the_first_output_tells_what_is_applied_before_there_is_a_token() -> None:
    engine, _ = make_engine()
    ledger = Ledger(engine)
    engine.add(make_request("long", range(20), "a", max_tokens=2))
    ledger.drain()
    first, *rest = ledger.outputs["long"]
    assert first.admitted
    assert first.adapter == make_adapter("a")
    assert first.tokens == ()
    assert all(not output.admitted and output.adapter is None for output in rest)


def test_the_last_output_has_the_reason_the_timing_and_the_last_token() -> None:
    engine, _ = make_engine()
    arrival = time.monotonic()
    ledger = run_all(engine, [make_request("r", max_tokens=3, arrival=arrival)])
    last = ledger.last("r")
    assert last.finish is FinishReason.LENGTH
    assert len(last.tokens) == 1
    assert last.timing is not None
    assert 0 < last.timing.queued <= last.timing.first_token <= last.timing.total
    assert last.timing.adapter_wait == 0


def test_a_stop_token_ends_the_answer_and_is_included() -> None:
    engine, _ = make_engine()
    third = expected(make_request(max_tokens=3))[2]
    sampling = SamplingParams(max_tokens=9, stop_token_ids=frozenset({third}))
    engine.add(make_request(sampling=sampling))
    ledger = Ledger(engine)
    ledger.drain()
    assert ledger.tokens("r") == expected(make_request(max_tokens=3))
    assert ledger.last("r").finish is FinishReason.STOP


@pytest.mark.parametrize(("min_tokens", "length"), [(2, 3), (3, 9)])
def test_a_stop_token_does_not_count_before_min_tokens(min_tokens: int, length: int) -> None:
    engine, _ = make_engine()
    third = expected(make_request(max_tokens=3))[2]
    sampling = SamplingParams(
        max_tokens=9, min_tokens=min_tokens, stop_token_ids=frozenset({third})
    )
    engine.add(make_request(sampling=sampling))
    ledger = Ledger(engine)
    ledger.drain()
    assert len(ledger.tokens("r")) == length


def test_the_context_length_ends_the_answer() -> None:
    engine, _ = make_engine(max_model_len=10)
    engine.add(make_request(prompt=range(7), max_tokens=50))
    ledger = Ledger(engine)
    ledger.drain()
    assert len(ledger.tokens("r")) == 3
    assert ledger.last("r").finish is FinishReason.LENGTH


def test_a_sequence_may_fill_the_whole_cache() -> None:
    engine, _ = make_engine(num_blocks=17, max_model_len=64)
    requests = [make_request(f"r{n}", range(n, n + 60), max_tokens=4) for n in range(3)]
    run_all(engine, requests)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": range(64)}, "prompt"),
        ({"request_id": "taken"}, "request_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"adapter": make_adapter(mode=MERGED)}, "mode"),
    ],
)
def test_bad_requests_are_refused_by_field(changes: dict[str, object], field: str) -> None:
    engine, _ = make_engine()
    engine.add(make_request("taken"))
    with pytest.raises(RequestInvalid) as refusal:
        engine.add(make_request(**changes))  # type: ignore[arg-type]
    assert refusal.value.field == field
    engine.check_integrity()


def test_an_adapter_larger_than_the_arena_is_refused() -> None:
    engine, _ = make_engine()
    with pytest.raises(AdapterTooLarge):
        engine.add(make_request(adapter=make_adapter(nbytes=3 * UNIT + 1)))
    assert not engine.has_work


def test_limits_that_could_serve_nobody_are_refused() -> None:
    for changes in (
        {"num_blocks": 16},
        {"max_step_tokens": 4},
        {"max_chunk_tokens": 0},
        {"max_chunk_tokens": 25},
        {"host_bytes": -1},
        {"prefetch_ahead": -1},
        {"max_pinned_share": -0.1},
        {"max_stretch": 1.0},
        {"max_pinned_share": 1.1},
    ):
        with pytest.raises(RequestInvalid) as refusal:
            make_config(**changes)
        assert changes.keys() & {refusal.value.field, "num_blocks"}


def test_the_queue_is_bounded_beyond_what_can_start_at_once() -> None:
    engine, _ = make_engine(max_running=2, max_waiting=3)
    for number in range(5):
        engine.add(make_request(f"r{number}"))
    with pytest.raises(QueueFull) as refusal:
        engine.add(make_request("r5"))
    assert 0.5 <= refusal.value.retry_after <= 30
    ledger = Ledger(engine)
    ledger.drain()
    engine.add(make_request("r5"))


def test_prefix_hits_are_reported_and_right() -> None:
    engine, runner = make_engine()
    prompt = list(range(10))
    run_all(engine, [make_request("first", prompt, "a")])
    ledger = run_all(engine, [make_request("second", prompt, "a"), make_request("base", prompt)])
    timings = {name: ledger.last(name).timing for name in ("second", "base")}
    assert {n: timing.cached_tokens for n, timing in timings.items() if timing} == {
        "second": 8,
        "base": 0,
    }
    assert min(row.start for b in runner.batches for row in b if row.request_id == "second") == 8


def test_stats_tell_how_full_the_engine_is() -> None:
    engine, _ = make_engine(max_running=1)
    ledger = Ledger(engine)
    engine.add(make_request("one", range(6), "a", max_tokens=9))
    engine.add(make_request("two", adapter="b"))
    ledger.step()
    ledger.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert (stats.running_adapters, stats.waiting_adapters) == (("a",), ("b",))
    assert stats.kv_blocks_used == 2
    assert stats.kv_blocks_total == 64
    assert stats.resident == {"sha256:a", "sha256:b"}
    assert (stats.arena_bytes_used, stats.arena_bytes_total) == (2 * UNIT, 3 * UNIT)
