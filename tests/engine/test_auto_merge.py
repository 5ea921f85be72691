"""The adapters that recent steps would have run faster with merged."""

from __future__ import annotations

from adaplex.engine.auto_merge import MIN_STEPS, STRIDE, WINDOW, AutoMerge
from adaplex.engine.batch import Batch
from engine.fakes import digest
from engine.machines import BF16_CPU, NF4_CPU, UNMERGED, ZEROS, chunks


def remember(auto: AutoMerge, name: str, steps: int) -> None:
    for _ in range(steps * STRIDE):
        auto.record_step(Batch(tuple(chunks(name, UNMERGED, 8))))


def test_only_recent_steps_make_merging_pay() -> None:
    auto = AutoMerge(BF16_CPU)
    remember(auto, "a", MIN_STEPS - 1)
    assert not auto.pays(digest("a"))
    remember(auto, "a", 1)
    assert auto.pays(digest("a"))
    assert auto.paying([digest("a"), digest("b")]) == {digest("a")}
    remember(auto, "b", WINDOW - MIN_STEPS + 1)
    assert auto.pays(digest("b"))
    assert not auto.pays(digest("a"))
    auto.suspend(digest("b"))
    remember(auto, "b", WINDOW - 1)
    assert not auto.pays(digest("b"))
    remember(auto, "b", 1)
    assert auto.pays(digest("b"))
    assert not auto._suspended
    remember(auto, "c", 3 * WINDOW)
    assert len(auto._sampled) == WINDOW


def test_what_merging_makes_of_an_adapter_is_judged_again_when_it_is_known() -> None:
    auto = AutoMerge(NF4_CPU)
    remember(auto, "a", WINDOW)
    assert not auto.pays(digest("a"))
    auto.record_share(digest("a"), ZEROS)
    assert auto.pays(digest("a"))
    auto.record_share(digest("a"), None)
    assert not auto.pays(digest("a"))


def test_without_costs_merging_never_pays() -> None:
    auto = AutoMerge(None)
    remember(auto, "a", WINDOW)
    assert not auto.pays(digest("a"))
