from __future__ import annotations

import pytest

from adaplex.adapters.errors import StoreCorrupt
from adaplex.engine.errors import AdapterLoadFailed, RequestInvalid
from engine.fakes import (
    AUTO,
    MERGED,
    Ledger,
    ManualExecutor,
    make_adapter,
    make_engine,
    make_request,
    run_all,
)
from fake_runner import FakeSource, expected


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


@pytest.mark.parametrize("host_bytes", [0, 1000])
def test_an_adapter_that_the_store_cannot_read_is_in_no_memory(host_bytes: int) -> None:
    source = FakeSource()
    engine, runner = make_engine(source=source, host_bytes=host_bytes)
    source.failing["sha256:bad"] = StoreCorrupt("bits")
    engine.add(make_request("r", adapter="bad"))
    ledger = Ledger(engine)
    ledger.drain()
    assert ledger.error("r") is source.failing["sha256:bad"]
    assert (runner.host, runner.extents, runner.loads) == (set(), {}, [])
    assert engine.stats().host_bytes_used == engine.stats().arena_bytes_used == 0


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
