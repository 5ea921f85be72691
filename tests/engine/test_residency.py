"""Host copies, prefetching, and steps that run while adapters load."""

from __future__ import annotations

import pytest

from adaplex.engine.load_jobs import Job
from engine.fakes import (
    UNIT,
    Ledger,
    ManualExecutor,
    digest,
    make_adapter,
    make_engine,
    make_request,
    run_all,
)
from fake_runner import expected


def test_an_evicted_adapter_comes_back_from_the_host() -> None:
    engine, runner = make_engine(arena_bytes=UNIT, host_bytes=4 * UNIT)
    for turn in range(3):
        run_all(engine, [make_request(f"{name}{turn}", adapter=name) for name in "abc"])
    assert sorted(runner.fetches) == [digest(name) for name in "abc"], "each is read once"
    assert len(runner.loads) >= 7
    assert engine.stats().host == {digest(name) for name in "abc"}
    assert engine.stats().host_bytes_used == 3 * UNIT


def test_the_host_keeps_to_its_budget() -> None:
    engine, runner = make_engine(arena_bytes=UNIT, host_bytes=2 * UNIT)
    for turn in range(3):
        run_all(engine, [make_request(f"{name}{turn}", adapter=name) for name in "abcd"])
        assert engine.stats().host_bytes_used <= 2 * UNIT
    assert len(runner.fetches) > 4
    assert runner.host == engine.stats().host


@pytest.mark.parametrize("host_bytes", [0, UNIT])
def test_what_the_host_has_no_room_for_is_loaded_from_the_store(host_bytes: int) -> None:
    engine, runner = make_engine(arena_bytes=3 * UNIT, host_bytes=host_bytes)
    large = make_adapter("large", 2 * UNIT)
    run_all(engine, [make_request("r", adapter=large)])
    assert runner.fetches == []
    assert runner.loads == [digest("large")]


def test_steps_go_on_while_an_adapter_is_fetched() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, host_bytes=4 * UNIT)
    ledger = Ledger(engine)
    cold, base = make_request("cold", adapter="a"), make_request("base", max_tokens=8)
    engine.add(cold)
    engine.add(base)
    while engine.has_work and not ("base" in ledger.outputs and ledger.last("base").last):
        ledger.step()
    assert ledger.tokens("base") == expected(base)
    assert "cold" not in ledger.outputs
    assert len(executor.jobs) == 1
    executor.run()
    ledger.step()
    assert runner.loads == [], "the copy is a job of its own"
    executor.run()
    ledger.drain()
    assert ledger.tokens("cold") == expected(cold)
    timing = ledger.last("cold").timing
    assert timing is not None
    assert timing.adapter_wait > 0


def test_what_waits_further_back_is_fetched_ahead() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(
        executor, max_running=1, arena_bytes=UNIT, host_bytes=8 * UNIT, prefetch_ahead=2
    )
    ledger = Ledger(engine)
    for i, name in enumerate("abcde"):
        engine.add(make_request(name, adapter=name, max_tokens=30, arrival=i))
    for _ in range(12):
        ledger.step()
        executor.run_all()
    assert set(runner.fetches) == {digest(name) for name in "abcd"}, "one runs, three are near"
    assert engine.stats().resident == {digest("a")}
    ledger.drain_with(executor)


def test_a_prefetch_evicts_nothing_that_is_wanted_sooner() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(
        executor, max_running=1, arena_bytes=UNIT, host_bytes=2 * UNIT, prefetch_ahead=4
    )
    ledger = Ledger(engine)
    for i, name in enumerate("abcde"):
        engine.add(make_request(name, adapter=name, max_tokens=40, arrival=i))
        for _ in range(6):
            ledger.step()
            executor.run_all()
    assert engine.stats().resident == {digest("a")}
    assert engine.stats().host == {digest("b"), digest("c")}
    assert runner.fetches == [digest(name) for name in "abc"], "d and e wait for room"
    ledger.drain_with(executor)


def test_what_comes_behind_one_without_room_is_fetched_ahead() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(
        executor, max_running=4, arena_bytes=UNIT, host_bytes=8 * UNIT, prefetch_ahead=2
    )
    ledger = Ledger(engine)
    for i, name in enumerate("abcdef"):
        engine.add(make_request(name, adapter=name, max_tokens=40, arrival=i))
        for _ in range(4):
            ledger.step()
            executor.run_all()
    assert engine.stats().waiting == 5, "places are free, the arena is not"
    assert set(runner.fetches) == {digest(name) for name in "abcd"}, "b has no room; two ahead"
    ledger.drain_with(executor)


def test_a_prefetch_leaves_a_thread_for_what_is_asked_for() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, max_running=1, host_bytes=16 * UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("runs", max_tokens=50))
    ledger.step()
    for i in range(8):
        engine.add(make_request(f"far{i}", adapter=f"far{i}", arrival=i))
    for _ in range(3):
        ledger.step()
        executor.run_all()
    ledger.step()
    ledger.step()
    assert runner.loads == [digest("far0")], "the next to start"
    assert len(executor.jobs) == 1, "one ahead, though the queue would like more"
    engine.add(make_request("urgent", adapter="urgent", priority=1))
    ledger.step()
    executor.run(1)
    assert runner.fetches[-1] == digest("urgent"), "it waits for no prefetch"
    ledger.drain_with(executor)


def test_a_host_copy_is_not_evicted_while_it_is_read() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, arena_bytes=2 * UNIT, host_bytes=UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("a", adapter="a"))
    ledger.step()
    executor.run()
    ledger.step()
    engine.abort("a")
    engine.add(make_request("b", adapter="b"))
    ledger.step()
    assert runner.host == {digest("a")}, "nobody waits for it, but it is being copied"
    executor.run(1)
    assert (runner.loads, runner.fetches) == ([digest("b")], [digest("a")]), "from the store"
    ledger.drain_with(executor)
    assert set(runner.extents) == {digest("a"), digest("b")}


def test_what_has_a_host_copy_leaves_the_arena_first() -> None:
    engine, runner = make_engine(arena_bytes=2 * UNIT, host_bytes=2 * UNIT)
    ledger = Ledger(engine)
    for name in "ab":
        run_all(engine, [make_request(name, adapter=name)])
    engine._residency._unmerged._host.unload(digest("a"))
    engine._residency._unmerged._costs.record("host", 1, 1000.0)
    engine.add(make_request("c", adapter="c"))
    ledger.drain()
    assert set(runner.extents) == {digest("a"), digest("c")}, "b came later, but is cheap"


def test_copies_do_not_queue_behind_slow_fetches() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, arena_bytes=UNIT, host_bytes=16 * UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("warm", adapter="warm"))
    ledger.drain_with(executor)
    engine.add(make_request("evicts", adapter="other"))
    ledger.drain_with(executor)
    for i in range(8):
        engine.add(make_request(f"slow{i}", adapter=f"slow{i}", arrival=i))
    engine.add(make_request("again", adapter="warm", arrival=99))
    ledger.step()
    jobs = engine._residency._jobs
    assert jobs.full(Job.FETCH)
    assert not jobs.full(Job.COPY)
    assert len(runner.loads) == 2
    executor.run(len(executor.jobs) - 1)
    assert runner.loads[-1] == digest("warm")
    ledger.drain_with(executor)


def test_a_failed_fetch_fails_only_those_who_wait_for_it() -> None:
    engine, runner = make_engine(host_bytes=4 * UNIT)
    runner.failing = {digest("bad"): OSError("disk")}
    ledger = Ledger(engine)
    for name in ("bad", "good"):
        engine.add(make_request(name, adapter=name))
    ledger.drain()
    assert "disk" in str(ledger.error("bad"))
    assert ledger.error("good") is None
    assert engine.stats().host == {digest("good")}


def test_unload_drops_every_copy() -> None:
    engine, runner = make_engine(host_bytes=4 * UNIT)
    run_all(engine, [make_request("r", adapter="a")])
    assert engine.unload(digest("a"))
    assert (runner.host, runner.extents) == (set(), {})
    assert not engine.unload(digest("a"))


def test_a_host_copy_that_is_read_is_unloaded_afterwards() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, host_bytes=4 * UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("r", adapter="a"))
    ledger.step()
    executor.run()
    ledger.step()
    engine.unload(digest("a"))
    assert runner.host == {digest("a")}, "it is being copied"
    ledger.drain_with(executor)
    assert ledger.error("r") is None
