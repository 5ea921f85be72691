from __future__ import annotations

from collections.abc import Callable

from adaplex.engine.adapter_cache import AdapterCache
from adaplex.engine.arena_allocator import ArenaAllocator
from adaplex.engine.observer import SilentObserver
from adaplex.engine.sequence import Sequence
from engine.fakes import UNIT, make_request


class Bench:
    """An arena tier, its removals and a way to fill it."""

    def __init__(
        self, units: int, cost: Callable[[str, int], float] = lambda _, nbytes: float(nbytes)
    ) -> None:
        self.removed: list[str] = []
        space = ArenaAllocator(units * UNIT)
        self.tier = AdapterCache("arena", space, self.removed.append, SilentObserver(), cost)

    def bring(self, digest: str, units: int = 1) -> bool:
        if self.tier.reserve(digest, units * UNIT) is None:
            return False
        self.tier.loaded(digest)
        return True


def sequence() -> Sequence:
    return Sequence(make_request())


def test_what_was_used_least_goes_first() -> None:
    bench = Bench(3)
    assert all(bench.bring(digest) for digest in "abc")
    user = sequence()
    bench.tier.lease("a", user)
    bench.tier.release("a", user)
    assert bench.bring("d")
    assert bench.removed == ["b"]
    assert bench.bring("e")
    assert bench.bring("f")
    assert bench.removed == ["b", "c", "a"]


def use(bench: Bench, digest: str, times: int = 1) -> None:
    for _ in range(times):
        user = sequence()
        bench.tier.lease(digest, user)
        bench.tier.release(digest, user)


def test_past_popularity_protects_for_a_while_only() -> None:
    bench = Bench(2)
    assert bench.bring("old")
    use(bench, "old", times=5)
    for number in range(20):
        assert bench.bring(str(number))
        use(bench, str(number))
        if "old" in bench.removed:
            break
    assert 2 < number < 19, "it outlived a few, and not all"


def test_what_is_cheap_to_bring_back_goes_first() -> None:
    seconds = {"dear": 10.0, "cheap": 1.0}
    bench = Bench(2, cost=lambda digest, _: seconds.get(digest, 5.0))
    assert bench.bring("cheap")
    assert bench.bring("dear")
    assert bench.bring("new")
    assert bench.removed == ["cheap"]


def test_bytes_are_weighed_against_cost() -> None:
    bench = Bench(5, cost=lambda _digest, _nbytes: 1.0)
    assert bench.bring("large", units=3)
    assert bench.bring("small")
    assert bench.bring("smaller")
    assert bench.bring("new", units=1)
    assert bench.removed == ["large"]


def test_pinned_ones_and_those_that_are_read_stay() -> None:
    bench = Bench(2)
    assert bench.bring("pinned")
    assert bench.bring("read")
    entry = bench.tier.get("pinned")
    assert entry is not None
    entry.pinned = True
    bench.tier.read("read")
    assert not bench.bring("new")
    assert bench.tier.could_hold(UNIT)
    assert not bench.tier.could_hold(2 * UNIT)
    bench.tier.unload("read")
    assert bench.removed == []
    bench.tier.read_ended("read")
    assert bench.removed == ["read"]


def test_neither_leased_nor_loading_nor_wanted_ones_are_evicted() -> None:
    bench = Bench(3)
    assert bench.bring("leased")
    assert bench.bring("wanted")
    assert bench.tier.reserve("loading", UNIT)
    user = sequence()
    bench.tier.lease("leased", user)
    bench.tier.wanted.add("wanted")
    assert not bench.bring("new")
    assert bench.removed == []
    bench.tier.start_round()
    assert bench.bring("new")
    assert bench.removed == ["wanted"]
    bench.tier.check_integrity([("leased", user)])


def test_eviction_goes_on_until_one_hole_is_large_enough() -> None:
    bench = Bench(4)
    assert all(bench.bring(digest) for digest in "abcd")
    user = sequence()
    bench.tier.lease("c", user)
    bench.tier.release("c", user)
    assert bench.bring("large", units=2)
    assert bench.removed == ["a", "b"]
    bench.tier.lease("d", user)
    assert not bench.bring("larger", units=4)
    assert bench.removed == ["a", "b"], "nothing is evicted in vain"


def test_holes_around_a_leased_adapter_do_not_add_up() -> None:
    bench = Bench(3)
    assert all(bench.bring(digest) for digest in "abc")
    user = sequence()
    bench.tier.lease("b", user)
    assert not bench.bring("large", units=2)
    bench.tier.release("b", user)
    assert bench.bring("large", units=2)


def test_a_failed_load_leaves_no_trace() -> None:
    bench = Bench(1)
    assert bench.tier.reserve("a", UNIT)
    bench.tier.failed("a")
    assert bench.tier.get("a") is None
    assert bench.tier.space.used == 0
    assert bench.removed == []
    assert bench.bring("a")


def test_unloading_waits_for_the_last_lease() -> None:
    bench = Bench(1)
    assert bench.bring("a")
    first, second = sequence(), sequence()
    bench.tier.lease("a", first)
    bench.tier.lease("a", second)
    assert bench.tier.unload("a")
    bench.tier.release("a", first)
    assert bench.removed == []
    bench.tier.release("a", second)
    assert bench.removed == ["a"]
    assert not bench.tier.unload("a")


def test_a_new_lease_cancels_unloading() -> None:
    bench = Bench(1)
    assert bench.bring("a")
    first, second = sequence(), sequence()
    bench.tier.lease("a", first)
    bench.tier.unload("a")
    bench.tier.lease("a", second)
    bench.tier.release("a", first)
    bench.tier.release("a", second)
    assert bench.tier.has("a")


def test_what_is_unloaded_while_it_loads_goes_as_soon_as_it_is_there() -> None:
    bench = Bench(1)
    assert bench.tier.reserve("a", UNIT)
    assert not bench.tier.unload("a")
    bench.tier.loaded("a")
    assert bench.removed == ["a"]
    assert bench.tier.space.used == 0
