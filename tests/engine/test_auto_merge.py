"""Which adapters the recent steps would have been faster with merged."""

from __future__ import annotations

from adaplex.engine.auto_merge import ENOUGH, REMEMBERED, STRIDE, AutoMerge
from adaplex.engine.batch import Batch
from engine.fakes import digest
from engine.machines import BF16_CPU, NF4_CPU, UNMERGED, ZEROS, chunks


def remember(popularity: AutoMerge, name: str, steps: int) -> None:
    for _ in range(steps * STRIDE):
        popularity.note(Batch(tuple(chunks(name, UNMERGED, 8))))


def test_only_recent_steps_make_merging_pay() -> None:
    popularity = AutoMerge(BF16_CPU)
    remember(popularity, "a", ENOUGH - 1)
    assert not popularity.pays(digest("a"))
    remember(popularity, "a", 1)
    assert popularity.pays(digest("a"))
    assert popularity.paying([digest("a"), digest("b")]) == {digest("a")}
    remember(popularity, "b", REMEMBERED - ENOUGH + 1)
    assert popularity.pays(digest("b"))
    assert not popularity.pays(digest("a"))
    popularity.forget(digest("b"))
    remember(popularity, "b", REMEMBERED - 1)
    assert not popularity.pays(digest("b"))
    remember(popularity, "b", 1)
    assert popularity.pays(digest("b"))
    assert not popularity._resting
    remember(popularity, "c", 3 * REMEMBERED)
    assert len(popularity._mixes) == REMEMBERED


def test_what_merging_makes_of_an_adapter_is_judged_again_when_it_is_known() -> None:
    popularity = AutoMerge(NF4_CPU)
    remember(popularity, "a", REMEMBERED)
    assert not popularity.pays(digest("a"))
    popularity.record_share(digest("a"), ZEROS)
    assert popularity.pays(digest("a"))
    popularity.record_share(digest("a"), None)
    assert not popularity.pays(digest("a"))


def test_without_costs_merging_never_pays() -> None:
    popularity = AutoMerge(None)
    remember(popularity, "a", REMEMBERED)
    assert not popularity.pays(digest("a"))
