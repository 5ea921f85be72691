from __future__ import annotations

import time

import pytest

from adaplex.adapters.errors import AdapterTooLarge, StoreCorrupt
from adaplex.engine.batch import Batch
from adaplex.engine.errors import (
    AdapterLoadFailed,
    DeadlineExpired,
    EngineFailed,
    LogitsOverflowed,
    QueueFull,
    RequestInvalid,
)
from adaplex.engine.request import (
    OVERFLOWED,
    AdapterMode,
    FinishReason,
    SampledToken,
    SamplingParams,
)
from engine.fakes import (
    UNIT,
    Ledger,
    ManualExecutor,
    expected,
    make_adapter,
    make_config,
    make_engine,
    make_request,
    next_token,
    run_all,
)

MERGED, AUTO = AdapterMode.MERGED, AdapterMode.AUTO


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


@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_point_frees_everything(steps: int) -> None:
    engine, _ = make_engine()
    ledger = Ledger(engine)
    other = make_request("other", range(30), "b")
    engine.add(make_request("victim", range(30), "a"))
    engine.add(other)
    for _ in range(steps):
        ledger.step()
    engine.abort("victim")
    engine.abort("unknown")
    engine.check_integrity()
    seen = len(ledger.outputs.get("victim", []))
    ledger.drain()
    assert len(ledger.outputs.get("victim", [])) == seen
    assert ledger.tokens("other") == expected(other)


def test_abort_while_the_adapter_loads() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor)
    ledger = Ledger(engine)
    engine.add(make_request("r", adapter="a"))
    ledger.step()
    engine.abort("r")
    executor.run_all()
    ledger.step()
    assert engine.stats().resident == {"sha256:a"}
    ledger.check_idle()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_deadline_ends_a_request_waiting_or_running(steps: int) -> None:
    engine, _ = make_engine()
    ledger = Ledger(engine)
    engine.add(make_request("r", range(30), deadline=time.monotonic() + (1e9 if steps else -1)))
    for _ in range(steps):
        ledger.step()
    if steps:
        assert engine.next_deadline is not None
        engine.abort("r")
        engine.add(make_request("r2", range(30), deadline=time.monotonic() + 0.02))
        ledger.step()
        time.sleep(0.03)
        ledger.step()
    name = "r2" if steps else "r"
    ledger.drain()
    assert isinstance(ledger.error(name), DeadlineExpired)
    assert ledger.last(name).timing is not None


def test_a_failed_load_hurts_only_those_who_wait_for_it_and_may_be_tried_again() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor)
    ledger = Ledger(engine)
    cause = OSError("disk")
    runner.failing["sha256:bad"] = cause
    good = [make_request("good", adapter="good"), make_request("base")]
    for request in [make_request("bad", adapter="bad"), *good, make_request("bad2", adapter="bad")]:
        engine.add(request)
    ledger.step()
    executor.run_all()
    ledger.drain()
    for name in ("bad", "bad2"):
        error = ledger.error(name)
        assert isinstance(error, AdapterLoadFailed)
        assert error.__cause__ is cause
    for request in good:
        assert ledger.tokens(request.request_id) == expected(request)
    assert engine.stats().resident == {"sha256:good"}
    del runner.failing["sha256:bad"]
    again = make_request("again", adapter="bad")
    engine.add(again)
    ledger.step()
    executor.run_all()
    ledger.drain()
    assert ledger.tokens("again") == expected(again)


def test_an_error_of_ours_is_passed_on_as_it_is() -> None:
    engine, runner = make_engine()
    runner.failing["sha256:bad"] = StoreCorrupt("bits")
    engine.add(make_request("r", adapter="bad"))
    ledger = Ledger(engine)
    ledger.drain()
    assert ledger.error("r") is runner.failing["sha256:bad"]


def test_unload_waits_for_those_who_run_and_drops_then() -> None:
    engine, runner = make_engine()
    ledger = Ledger(engine)
    request = make_request("r", adapter="a", max_tokens=10)
    engine.add(request)
    ledger.step()
    ledger.step()
    assert engine.unload("sha256:a")
    ledger.step()
    assert "sha256:a" in runner.extents
    ledger.drain()
    assert ledger.tokens("r") == expected(request)
    assert runner.extents == {}
    assert engine.stats().arena_bytes_used == 0
    assert not engine.unload("sha256:a")
    run_all(engine, [make_request("again", adapter="a")])


def test_unload_drops_an_idle_adapter_at_once() -> None:
    engine, runner = make_engine()
    run_all(engine, [make_request("r", adapter="a")])
    assert engine.unload("sha256:a")
    assert runner.extents == {}
    engine.check_integrity()


def test_unload_during_the_load_does_not_lose_those_who_wait() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor)
    ledger = Ledger(engine)
    request = make_request("r", adapter="a")
    engine.add(request)
    ledger.step()
    assert not engine.unload("sha256:a")
    executor.run_all()
    ledger.step()
    executor.run_all()
    ledger.drain()
    assert ledger.tokens("r") == expected(request)


def test_a_failed_step_fails_its_batch_and_the_engine_lives_on() -> None:
    engine, runner = make_engine(max_running=2)
    ledger = Ledger(engine)
    waiting = make_request("waiting", adapter="b")
    engine.add(make_request("a", adapter="a"))
    engine.add(make_request("base"))
    engine.add(waiting)
    ledger.step()
    runner.step_failure = RuntimeError("device")
    ledger.step()
    runner.step_failure = None
    for name in ("a", "base"):
        error = ledger.error(name)
        assert isinstance(error, EngineFailed)
        assert isinstance(error.__cause__, RuntimeError)
    ledger.drain()
    assert ledger.tokens("waiting") == expected(waiting)


def test_a_runner_that_returns_too_few_tokens_fails_the_batch() -> None:
    engine, runner = make_engine()
    runner.run = lambda batch: []  # type: ignore[method-assign]
    engine.add(make_request("r"))
    ledger = Ledger(engine)
    ledger.drain()
    assert isinstance(ledger.error("r"), EngineFailed)


def test_merged_requests_run_on_merged_weights() -> None:
    engine, runner = make_engine(merged_bytes=250)
    requests = [
        make_request(f"r{n}", [n], make_adapter(f"m{n % 5}", mode=MERGED), max_tokens=3)
        for n in range(20)
    ]
    ledger = run_all(engine, requests)
    assert runner.extents == {}
    assert len(engine.stats().merged) == 2
    assert engine.stats().merged_bytes_used == 200
    assert all(ledger.outputs[r.request_id][0].adapter == r.adapter for r in requests)


def test_merged_and_unmerged_rows_of_one_adapter_share_a_batch_and_no_kv() -> None:
    engine, runner = make_engine(merged_bytes=100)
    run_all(engine, [make_request("warm", range(9), make_adapter("a", mode=MERGED))])
    run_all(engine, [make_request("warm2", range(9), "a")])
    run_all(
        engine,
        [
            make_request("merged", range(20, 40), make_adapter("a", mode=MERGED)),
            make_request("unmerged", range(20, 40), "a"),
        ],
    )
    assert {row.mode for row in runner.batches[-1]} == {"merged", "unmerged"}


def test_merged_weights_over_the_budget_are_refused_by_name() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor, merged_bytes=99)
    ledger = Ledger(engine)
    engine.add(make_request("first", adapter=make_adapter("a", mode=MERGED)))
    engine.add(make_request("plain", adapter="a"))
    ledger.step()
    executor.run_all()
    ledger.drain()
    error = ledger.error("first")
    assert isinstance(error, RequestInvalid)
    assert error.field == "mode"
    assert "99" in str(error)
    assert ledger.error("plain") is None
    with pytest.raises(RequestInvalid, match="99"):
        engine.add(make_request("second", adapter=make_adapter("a", mode=MERGED)))


def test_auto_serves_unmerged_until_merged_weights_are_earned_and_built() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, merged_bytes=100, merge_after=8)
    ledger = Ledger(engine)
    modes = []
    for number in range(5):
        request = make_request(f"r{number}", [number], make_adapter("a", mode=AUTO))
        engine.add(request)
        while engine.has_work:
            ledger.step()
            if runner.extents == {}:
                executor.run_all()
        executor.run_all()  # what the third request started goes on behind it
        ledger.step()
        executor.run_all()
        ledger.step()
        assert ledger.tokens(request.request_id) == expected(request)
        adapter = ledger.outputs[request.request_id][0].adapter
        assert adapter is not None
        modes.append(adapter.mode.value)
    assert modes == ["unmerged", "unmerged", "unmerged", "unmerged", "merged"]


def test_auto_without_a_budget_is_unmerged() -> None:
    engine, runner = make_engine()
    ledger = run_all(engine, [make_request("r", adapter=make_adapter("a", mode=AUTO))])
    assert ledger.outputs["r"][0].adapter == make_adapter("a")
    assert runner.merged == set()


def test_a_background_build_that_fails_hurts_nobody() -> None:
    engine, runner = make_engine(merged_bytes=100, merge_after=4)
    run_all(engine, [make_request("warm", adapter="a")])
    runner.failing["sha256:a"] = MemoryError()
    for number in range(6):
        request = make_request(f"r{number}", adapter=make_adapter("a", mode=AUTO))
        run_all(engine, [request])
    assert runner.loads.count("sha256:a") > 1
    assert engine.stats().merged == frozenset()
    engine.check_integrity()


def test_background_builds_do_not_push_out_what_is_hot() -> None:
    engine, runner = make_engine(merged_bytes=100, merge_after=4)
    for number in range(12):
        name = "ab"[number % 2]
        run_all(engine, [make_request(f"r{number}", adapter=make_adapter(name, mode=AUTO))])
    assert runner.merged == {"sha256:a"}


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


def test_the_fake_runner_knows_one_token_from_another() -> None:
    assert next_token("a", [1, 2]) != next_token("b", [1, 2]) != next_token("a", [2, 1])


def test_a_row_that_overflows_fails_alone() -> None:
    engine, runner = make_engine()
    plain = runner.run

    def overflow(batch: Batch) -> list[SampledToken]:
        return [
            SampledToken(OVERFLOWED) if chunk.sequence.request_id == "bad" else token
            for chunk, token in zip(batch.sampling, plain(batch), strict=True)
        ]

    runner.run = overflow  # type: ignore[method-assign]
    good = make_request("good", max_tokens=3)
    ledger = Ledger(engine)
    for request in (make_request("bad", [7, 8]), good):
        engine.add(request)
    ledger.drain()
    assert isinstance(ledger.error("bad"), LogitsOverflowed)
    assert ledger.tokens("good") == expected(good)
    engine.check_integrity()
