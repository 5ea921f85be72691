"""The value of an adapter in memory, and the measured costs of loading it."""

from __future__ import annotations

import pytest

from adaplex.engine.eviction import HALF_LIFE_USES, SMOOTHING, GreedyDual, LoadCosts
from adaplex.engine.load_jobs import Completion, Job, LoadJobs
from adaplex.engine.merged_residency import MergedResidency
from adaplex.engine.observer import SilentObserver
from adaplex.engine.sequence import Sequence
from engine.fakes import InlineExecutor, digest, make_config, make_request
from fake_runner import FakeRunner, FakeSource


def test_uses_and_cost_raise_the_value_and_bytes_lower_it() -> None:
    policy = GreedyDual()
    usage = policy.first_use()
    assert policy.value(usage, seconds=3.0, nbytes=2) == 1.5
    policy.record_use(usage)
    assert policy.value(usage, seconds=3.0, nbytes=2) == pytest.approx(3.0, rel=0.01)
    assert policy.value(usage, seconds=3.0, nbytes=4) == pytest.approx(1.5, rel=0.01)


def test_what_comes_after_an_eviction_is_worth_more_than_what_went() -> None:
    policy = GreedyDual()
    old = policy.value(policy.first_use(), seconds=5.0, nbytes=1)
    policy.record_eviction(old)
    policy.record_eviction(1.0)
    assert policy.value(policy.first_use(), seconds=1.0, nbytes=1) == old + 1.0


def test_uses_count_half_after_a_half_life_even_if_nothing_is_evicted() -> None:
    policy = GreedyDual()
    popular, other = policy.first_use(), policy.first_use()
    for _ in range(9):
        policy.record_use(popular)
    before = policy.value(popular, seconds=1.0, nbytes=1)
    for _ in range(HALF_LIFE_USES):
        policy.record_use(other)
    assert policy.value(popular, seconds=1.0, nbytes=1) == pytest.approx(before / 2)
    assert policy.clock == 0.0


def test_the_first_measurement_counts_whole_and_later_ones_in_part() -> None:
    costs = LoadCosts()
    unknown = costs.seconds("host", 100)
    assert unknown > 0
    costs.record("host", 10, 20.0)
    assert costs.seconds("host", 100) == pytest.approx(200.0)
    costs.record("host", 10, 120.0)
    assert costs.seconds("host", 1) == pytest.approx(2.0 + SMOOTHING * 10.0)
    assert costs.seconds("copy", 100) == unknown


def test_a_build_is_measured_by_its_bytes_even_if_it_is_unloaded_meanwhile() -> None:
    runner, costs = FakeRunner(), LoadCosts()
    jobs = LoadJobs(FakeSource(), lambda: None, InlineExecutor())
    config = make_config(merged_bytes=250)
    merged = MergedResidency(config, runner, jobs, SilentObserver(), costs)
    waiting = Sequence(make_request(adapter="a"))
    merged.load(waiting, digest("a"))
    (measured,) = jobs.collect()
    merged.complete(measured)
    merged.load(waiting, digest("a"))
    merged.unload(digest("a"))
    merged.complete(Completion(Job.BUILD, digest("a"), seconds=50.0))
    assert costs.seconds("merged", runner.merged_size) == pytest.approx(50.0)
