"""Pins: they are loaded, they stay, their bytes are bounded, and no request waits in vain."""

from __future__ import annotations

import pytest

from adaplex.engine.errors import NoRoomBesidePins, PinsFull
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


def test_a_pinned_adapter_comes_unasked_and_stays() -> None:
    engine, runner = make_engine(arena_bytes=2 * UNIT, host_bytes=8 * UNIT)
    ledger = Ledger(engine)
    engine.pin(digest("p"), UNIT, "p")
    assert engine.stats().pinned == {digest("p")}
    for _ in range(3):
        ledger.step()
    assert digest("p") in engine.stats().resident
    run_all(engine, [make_request(name, adapter=name) for name in "abcd"])
    assert digest("p") in engine.stats().resident
    assert runner.loads.count(digest("p")) == 1
    engine.unpin(digest("p"))
    assert engine.stats().pinned == frozenset()
    run_all(engine, [make_request(f"{name}2", adapter=name) for name in "abcd"])
    assert digest("p") not in engine.stats().resident


def test_pins_are_bounded_in_bytes() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    engine.pin(digest("a"), UNIT, "a")
    engine.pin(digest("a"), UNIT, "a")
    engine.pin(digest("b"), UNIT, "b")
    with pytest.raises(PinsFull, match=f"pins take {2 * UNIT} of the {2 * UNIT} that"):
        engine.pin(digest("c"), 1, "c")
    assert engine.stats().pinned_bytes_used == engine.stats().pinned_bytes_total == 2 * UNIT
    assert engine.unload(digest("a")) is False
    assert engine.stats().pinned == {digest("b")}
    engine.pin(digest("c"), UNIT, "c")


def test_a_pin_that_other_pins_leave_no_stretch_for_is_refused() -> None:
    engine, _ = make_engine(arena_bytes=8 * UNIT, max_pinned_share=0.8)
    run_all(engine, [make_request(name, adapter=name) for name in "abcdefgh"])
    for name in "cf":
        engine.pin(digest(name), UNIT, name)
    engine.pin(digest("fits"), 2 * UNIT, "fits")
    engine.unpin(digest("fits"))
    with pytest.raises(PinsFull, match="long takes 192 contiguous bytes"):
        engine.pin(digest("long"), 3 * UNIT, "long")
    assert engine.stats().pinned == {digest("c"), digest("f")}


def test_a_request_without_room_beside_pins_is_refused() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    ledger = Ledger(engine)
    engine.pin(digest("p"), UNIT, "p")
    ledger.step()
    with pytest.raises(NoRoomBesidePins, match="of the arena's 256, 64 are pinned"):
        engine.add(make_request("r", adapter=make_adapter("large", 4 * UNIT)))
    run_all(engine, [make_request("fits", adapter=make_adapter("fits", 3 * UNIT))])


def test_a_pinned_adapter_that_leaves_no_room_for_a_second_like_it_is_served() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    run_all(engine, [make_request("first", adapter="first")])
    engine.pin(digest("p"), 2 * UNIT, "p")
    ledger = Ledger(engine)
    ledger.step()
    ledger.step()
    assert digest("p") in engine.stats().resident
    run_all(engine, [make_request("r", adapter=make_adapter("p", 2 * UNIT))])


def test_a_request_that_waits_when_the_pin_comes_fails() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, arena_bytes=4 * UNIT)
    ledger = Ledger(engine)
    engine.add(make_request("large", adapter=make_adapter("large", 4 * UNIT)))
    engine.add(make_request("small", adapter="small"))
    engine.pin(digest("p"), UNIT, "p")
    ledger.drain_with(executor)
    assert isinstance(ledger.error("large"), NoRoomBesidePins)
    assert ledger.error("small") is None
    assert digest("large") not in runner.loads


def test_a_request_fails_for_a_pin_even_if_nothing_else_goes_on() -> None:
    engine, _ = make_engine(arena_bytes=4 * UNIT)
    run_all(engine, [make_request("first", adapter="p")])
    ledger = Ledger(engine)
    engine.add(make_request("large", adapter=make_adapter("large", 4 * UNIT)))
    engine.pin(digest("p"), UNIT, "p")
    ledger.step()
    assert not engine.stalled, "or nothing would wake the engine to tell"
    ledger.step()
    assert isinstance(ledger.error("large"), NoRoomBesidePins)
    assert engine.stalled


def test_a_pin_gets_its_room_from_those_who_use_it_in_turns() -> None:
    engine, _ = make_engine(arena_bytes=2 * UNIT, max_pinned_share=1.0, max_bypass=3)
    ledger = Ledger(engine)
    for turn in range(4):
        engine.add(make_request(f"{turn}", adapter="ab"[turn % 2], max_tokens=8))
        for _ in range(3):
            ledger.step()
    assert engine.stats().running == 2
    engine.pin(digest("p"), 2 * UNIT, "p")
    for turn in range(4, 24):  # one of the two always runs when the other ends
        try:
            engine.add(make_request(f"{turn}", adapter="ab"[turn % 2], max_tokens=8))
        except NoRoomBesidePins:
            break
        for _ in range(3):
            ledger.step()
    ledger.step()
    assert engine.stats().resident == {digest("p")}
    assert turn < 12, "three may pass it, and those have to end"
    ledger.drain()
    errors = [ledger.error(request_id) for request_id in ledger.outputs]
    assert any(isinstance(error, NoRoomBesidePins) for error in errors), "it took the whole arena"


def test_the_host_copy_for_a_pin_that_waits_for_room_is_kept() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, arena_bytes=2 * UNIT, host_bytes=UNIT)
    ledger = Ledger(engine)
    for name in "ab":
        engine.add(make_request(name, adapter=name, max_tokens=50))
    for _ in range(4):
        executor.run_all()
        ledger.step()
    engine.pin(digest("p"), UNIT, "p")
    for name in "cde":
        engine.add(make_request(name, adapter=name))
    for _ in range(20):
        executor.run_all()
        ledger.step()
    assert runner.fetches.count(digest("p")) == 1
    assert engine.stats().host == {digest("p")}
    ledger.drain_with(executor)
    assert digest("p") in engine.stats().resident


def test_a_pin_does_not_take_the_room_that_an_earlier_one_waits_for() -> None:
    engine, _ = make_engine(arena_bytes=3 * UNIT, max_pinned_share=1.0)
    ledger = Ledger(engine)
    for name, length in (("a", 12), ("gap", 1), ("b", 12)):
        engine.add(make_request(name, adapter=name, max_tokens=length))
    for _ in range(4):
        ledger.step()
    engine.unload(digest("gap"))
    assert engine.stats().running == 2
    engine.pin(digest("p"), 2 * UNIT, "p")
    engine.pin(digest("q"), UNIT, "q")
    ledger.step()
    ledger.step()
    assert engine.stats().arena_bytes_used == 2 * UNIT, "the gap would do for q, and ruin p"
    ledger.drain()
    for _ in range(3):
        ledger.step()
    assert engine.stats().resident == {digest("p"), digest("q")}


def test_a_pin_that_has_lost_its_place_to_another_holds_nobody_up() -> None:
    engine, _ = make_engine(arena_bytes=5 * UNIT, max_pinned_share=1.0)
    ledger = Ledger(engine)
    engine.add(make_request("first", adapter="first", max_tokens=20))
    for _ in range(3):
        ledger.step()
    engine.pin(digest("p"), 2 * UNIT, "p")
    engine.pin(digest("q"), 3 * UNIT, "q")
    for name in "abc":
        engine.add(make_request(name, adapter=name))
    ledger.drain()
    for name in "abc":
        assert ledger.error(name) is None
    assert engine.stats().pinned - engine.stats().resident == {digest("q")}
    with pytest.raises(NoRoomBesidePins):
        engine.add(make_request("q", adapter=make_adapter("q", 3 * UNIT)))


def test_a_pin_keeps_what_was_to_be_dropped_after_use() -> None:
    engine, runner = make_engine()
    ledger = Ledger(engine)
    request = make_request("r", adapter="a")
    engine.add(request)
    ledger.step()
    ledger.step()
    assert engine.unload(digest("a"))
    engine.pin(digest("a"), UNIT, "a")
    ledger.drain()
    assert ledger.tokens("r") == expected(request)
    assert engine.stats().resident == {digest("a")}
    assert runner.loads == [digest("a")]


@pytest.mark.parametrize("host_bytes", [0, 4 * UNIT])
def test_a_pin_that_cannot_be_loaded_is_given_up(host_bytes: int) -> None:
    engine, runner = make_engine(host_bytes=host_bytes)
    runner.failing = {digest("p"): OSError("disk")}
    ledger = Ledger(engine)
    engine.pin(digest("p"), UNIT, "p")
    for _ in range(5):
        ledger.step()
    assert len(runner.fetches + runner.loads) == 1, "not tried over and over"
    assert engine.stats().pinned == frozenset()
    assert engine.stats().pinned_bytes_used == 0
