"""Tiers: host copies, prefetching, pins, and steps that go on while adapters come."""

from __future__ import annotations

import pytest

from adaplex.engine.errors import NoRoomBesidePins, PinsFull
from adaplex.engine.loader import Job
from engine.fakes import (
    UNIT,
    Ledger,
    ManualExecutor,
    expected,
    make_adapter,
    make_engine,
    make_request,
    run_all,
)


def digest(name: str) -> str:
    return f"sha256:{name}"


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
    ledger_drained(ledger, executor)


def ledger_drained(ledger: Ledger, executor: ManualExecutor) -> None:
    while ledger.engine.has_work:
        executor.run_all()
        ledger.step()
    executor.run_all()
    ledger.step()
    ledger.check_idle()


def test_a_prefetch_evicts_nothing_that_is_wanted_sooner() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(
        executor, max_running=2, arena_bytes=2 * UNIT, host_bytes=2 * UNIT, prefetch_ahead=4
    )
    ledger = Ledger(engine)
    for i, name in enumerate("abcdef"):
        engine.add(make_request(name, adapter=name, arrival=i))
    ledger.step()
    executor.run_all()
    ledger.step()
    assert {digest("a"), digest("b")} <= engine.stats().host | engine.stats().resident
    ledger_drained(ledger, executor)
    assert not runner.failing


def test_copies_do_not_queue_behind_slow_fetches() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, arena_bytes=UNIT, host_bytes=16 * UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("warm", adapter="warm"))
    ledger_drained(ledger, executor)
    engine.add(make_request("evicts", adapter="other"))
    ledger_drained(ledger, executor)
    for i in range(8):
        engine.add(make_request(f"slow{i}", adapter=f"slow{i}", arrival=i))
    engine.add(make_request("again", adapter="warm", arrival=99))
    ledger.step()
    loader = engine._residency.loader
    assert loader.full(Job.FETCH)
    assert not loader.full(Job.COPY)
    assert len(runner.loads) == 2
    executor.run(len(executor.jobs) - 1)
    assert runner.loads[-1] == digest("warm")
    ledger_drained(ledger, executor)


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


def test_unload_drops_every_tier() -> None:
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
    ledger_drained(ledger, executor)
    assert ledger.error("r") is None


def test_a_pinned_adapter_comes_unasked_and_stays() -> None:
    engine, runner = make_engine(arena_bytes=2 * UNIT, host_bytes=8 * UNIT)
    ledger = Ledger(engine)
    engine.pin(digest("p"), UNIT, "p")
    ledger.step()
    ledger.step()
    ledger.step()
    assert digest("p") in engine.stats().resident
    run_all(engine, [make_request(name, adapter=name) for name in "abcd"])
    assert digest("p") in engine.stats().resident
    assert runner.loads.count(digest("p")) == 1
    engine.unpin(digest("p"))
    run_all(engine, [make_request(f"{name}2", adapter=name) for name in "abcd" * 3][:4])
    assert digest("p") not in engine.stats().resident


def test_pins_are_bounded_in_bytes() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    engine.pin(digest("a"), UNIT, "a")
    engine.pin(digest("a"), UNIT, "a")
    engine.pin(digest("b"), UNIT, "b")
    with pytest.raises(PinsFull, match=f"{2 * UNIT} are pinned of the {2 * UNIT}"):
        engine.pin(digest("c"), 1, "c")
    assert engine.stats().pinned_bytes_used == engine.stats().pinned_bytes_total == 2 * UNIT
    assert engine.unload(digest("a")) is False
    engine.pin(digest("c"), UNIT, "c")


def test_a_request_without_room_beside_pins_is_refused() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    ledger = Ledger(engine)
    engine.pin(digest("p"), UNIT, "p")
    ledger.step()
    with pytest.raises(NoRoomBesidePins, match="of the arena's 256, 64 are pinned"):
        engine.add(make_request("r", adapter=make_adapter("large", 4 * UNIT)))
    run_all(engine, [make_request("fits", adapter=make_adapter("fits", 3 * UNIT))])


def test_a_request_that_waits_when_the_pin_comes_fails_in_the_end() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor, arena_bytes=4 * UNIT, max_running=4)
    ledger = Ledger(engine)
    engine.add(make_request("first", adapter=make_adapter("x", 2 * UNIT), max_tokens=3))
    engine.pin(digest("p"), UNIT, "p")
    ledger.step()
    engine.add(make_request("other", max_tokens=30))
    executor.run_all()
    ledger.step()
    ledger_drained(ledger, executor)
    engine.unload(digest("p"))
    engine.add(make_request("large", adapter=make_adapter("large", 4 * UNIT)))
    engine.pin(digest("q"), UNIT, "q")
    ledger_drained(ledger, executor)
    assert isinstance(ledger.error("large"), NoRoomBesidePins) or ledger.error("large") is None
    assert ledger.error("first") is None
