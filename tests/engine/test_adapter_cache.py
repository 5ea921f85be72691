from __future__ import annotations

from collections.abc import Callable

from adaplex.engine.adapter_cache import AdapterCache
from adaplex.engine.arena_allocator import ArenaAllocator
from adaplex.engine.observer import SilentObserver
from adaplex.engine.sequence import Sequence
from engine.fakes import UNIT, make_request


class Bench:
    """An arena cache, the digests it removed, and a way to fill it."""

    def __init__(
        self, units: int, cost: Callable[[str, int], float] = lambda _, nbytes: float(nbytes)
    ) -> None:
        self.removed: list[str] = []
        space = ArenaAllocator(units * UNIT)
        self.cache = AdapterCache("arena", space, self.removed.append, SilentObserver(), cost)

    def load(self, digest: str, units: int = 1) -> bool:
        if self.cache.reserve(digest, units * UNIT) is None:
            return False
        self.cache.finish_load(digest)
        return True


def sequence() -> Sequence:
    return Sequence(make_request())


def test_what_was_used_least_goes_first() -> None:
    bench = Bench(3)
    assert all(bench.load(digest) for digest in "abc")
    user = sequence()
    bench.cache.lease("a", user)
    bench.cache.release("a", user)
    assert bench.load("d")
    assert bench.removed == ["b"]
    assert bench.load("e")
    assert bench.load("f")
    assert bench.removed == ["b", "c", "a"]


def use(bench: Bench, digest: str, times: int = 1) -> None:
    for _ in range(times):
        user = sequence()
        bench.cache.lease(digest, user)
        bench.cache.release(digest, user)


def test_past_popularity_protects_for_a_while_only() -> None:
    bench = Bench(2)
    assert bench.load("old")
    use(bench, "old", times=5)
    for number in range(20):
        assert bench.load(str(number))
        use(bench, str(number))
        if "old" in bench.removed:
            break
    assert 2 < number < 19, "it outlived a few, and not all"


def test_what_is_cheap_to_bring_back_goes_first() -> None:
    seconds = {"dear": 10.0, "cheap": 1.0}
    bench = Bench(2, cost=lambda digest, _: seconds.get(digest, 5.0))
    assert bench.load("cheap")
    assert bench.load("dear")
    assert bench.load("new")
    assert bench.removed == ["cheap"]


def test_bytes_are_weighed_against_cost() -> None:
    bench = Bench(5, cost=lambda _digest, _nbytes: 1.0)
    assert bench.load("large", units=3)
    assert bench.load("small")
    assert bench.load("smaller")
    assert bench.load("new", units=1)
    assert bench.removed == ["large"]


def test_pinned_ones_and_those_that_are_read_stay() -> None:
    bench = Bench(2)
    assert bench.load("pinned")
    assert bench.load("read")
    pins = {"pinned"}
    bench.cache.begin_read("read")
    assert bench.cache.reserve("new", UNIT, exempt=pins) is None
    assert bench.cache.fits_beside(pins, UNIT)
    assert not bench.cache.fits_beside(pins, 2 * UNIT)
    bench.cache.unload("read")
    assert bench.removed == []
    bench.cache.end_read("read")
    assert bench.removed == ["read"]


def test_neither_leased_nor_loading_nor_wanted_ones_are_evicted() -> None:
    bench = Bench(3)
    assert bench.load("leased")
    assert bench.load("wanted")
    assert bench.cache.reserve("loading", UNIT)
    user = sequence()
    bench.cache.lease("leased", user)
    bench.cache.protect("wanted")
    assert not bench.load("new")
    assert bench.removed == []
    bench.cache.begin_step()
    assert bench.load("new")
    assert bench.removed == ["wanted"]
    bench.cache.check_integrity([("leased", user)])


def test_eviction_goes_on_until_one_hole_is_large_enough() -> None:
    bench = Bench(4)
    assert all(bench.load(digest) for digest in "abcd")
    user = sequence()
    bench.cache.lease("c", user)
    bench.cache.release("c", user)
    assert bench.load("large", units=2)
    assert bench.removed == ["a", "b"]
    bench.cache.lease("d", user)
    assert not bench.load("larger", units=4)
    assert bench.removed == ["a", "b"], "nothing is evicted in vain"


def test_holes_around_a_leased_adapter_do_not_add_up() -> None:
    bench = Bench(3)
    assert all(bench.load(digest) for digest in "abc")
    user = sequence()
    bench.cache.lease("b", user)
    assert not bench.load("large", units=2)
    bench.cache.release("b", user)
    assert bench.load("large", units=2)


def test_a_failed_load_leaves_no_trace() -> None:
    bench = Bench(1)
    assert bench.cache.reserve("a", UNIT)
    bench.cache.cancel_load("a")
    assert bench.cache.get("a") is None
    assert bench.cache.stats().used == 0
    assert bench.removed == []
    assert bench.load("a")


def test_unloading_waits_for_the_last_lease() -> None:
    bench = Bench(1)
    assert bench.load("a")
    first, second = sequence(), sequence()
    bench.cache.lease("a", first)
    bench.cache.lease("a", second)
    assert bench.cache.unload("a")
    bench.cache.release("a", first)
    assert bench.removed == []
    bench.cache.release("a", second)
    assert bench.removed == ["a"]
    assert not bench.cache.unload("a")


def test_a_new_lease_cancels_unloading() -> None:
    bench = Bench(1)
    assert bench.load("a")
    first, second = sequence(), sequence()
    bench.cache.lease("a", first)
    bench.cache.unload("a")
    bench.cache.lease("a", second)
    bench.cache.release("a", first)
    bench.cache.release("a", second)
    assert bench.cache.has("a")


def test_what_is_unloaded_while_it_loads_goes_as_soon_as_it_is_there() -> None:
    bench = Bench(1)
    assert bench.cache.reserve("a", UNIT)
    assert not bench.cache.unload("a")
    bench.cache.finish_load("a")
    assert bench.removed == ["a"]
    assert bench.cache.stats().used == 0
