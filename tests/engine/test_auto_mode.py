"""auto against the two fixed modes, on machines whose steps take what a cost model says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.cost_model import Merge, Mix, StepCosts
from adaplex.engine.engine import Engine
from adaplex.engine.popularity import ENOUGH, REMEMBERED, STRIDE, Popularity
from adaplex.engine.request import AdapterMode, SampledToken
from adaplex.engine.sequence import Sequence
from engine.fakes import (
    UNIT,
    FakeRunner,
    InlineExecutor,
    digest,
    make_adapter,
    make_config,
    make_request,
)

UNMERGED, MERGED, AUTO = AdapterMode.UNMERGED, AdapterMode.MERGED, AdapterMode.AUTO
ROWS = (1, 4, 8, 16, 32, 128)


def scaled(*milliseconds: float) -> tuple[float, ...]:
    return tuple(value * 1e-3 for value in milliseconds)


NF4_CPU = StepCosts(
    ROWS,
    scaled(3.8, 5.0, 7.0, 13.0, 28.0, 120.0),
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(0.3, 1.0, 2.0, 4.0, 6.0, 16.0),
    0.2e-3,
)
BF16_CPU = StepCosts(
    ROWS,
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(0.3, 1.0, 2.0, 4.0, 6.0, 16.0),
    0.2e-3,
)
GPU = StepCosts(
    ROWS,
    scaled(1.0, 1.0, 1.1, 1.3, 1.8, 4.0),
    scaled(1.5, 1.5, 1.5, 1.5, 1.6, 2.0),
    scaled(0.9, 0.9, 0.9, 1.0, 1.1, 1.5),
    0.05e-3,
)
MACHINES = {"nf4 cpu": NF4_CPU, "bf16 cpu": BF16_CPU, "gpu": GPU}
STREAMS = 8
DENSE = Merge(100)
ZEROS = Merge(100, dense=0.0, kept=1.0)
"""Of QA-LoRA on an int4-group base."""
FEW = Merge(100, dense=0.25)
"""Of an adapter on some of the linears."""


def adapters(skew: str, seed: int = 7) -> Iterator[str]:
    """The adapter of each request, one after another."""
    chance = random.Random(seed)
    weights = {
        "identical": [1.0],
        "skewed": [0.97, 0.03],
        "zipf": [1 / rank**1.5 for rank in range(1, 9)],
        "uniform": [1.0] * 3,
    }
    for number in count():
        if skew == "distinct":
            yield f"a{number % (2 * STREAMS)}"
        else:
            ranks = range(len(weights[skew]))
            yield f"a{chance.choices(ranks, weights[skew])[0]}"


class ModelledRunner(FakeRunner):
    """Moves a clock by what its costs say, for adapters that all merge alike."""

    def __init__(self, costs: StepCosts, merge: Merge) -> None:
        super().__init__()
        self.costs, self.merge = costs, merge

    def measure_merge(self, digest: str) -> Merge:
        return self.merge

    def step_costs(self) -> StepCosts:
        return self.costs

    def run(self, batch: Batch) -> list[SampledToken]:
        mix = Mix.of(batch)
        self.now += self.costs.step_seconds(
            mix, dict.fromkeys(mix.merged | mix.unmerged, self.merge)
        )
        for chunk in batch.chunks:
            self._check_adapter(chunk)
        return [SampledToken(1) for _ in batch.sampling]


class Traffic:
    """Streams back to back."""

    def __init__(
        self, costs: StepCosts, skew: str, mode: AdapterMode, merge: Merge = DENSE
    ) -> None:
        self.runner, self.mode = ModelledRunner(costs, merge), mode
        self.engine = Engine(
            make_config(
                num_blocks=600,
                arena_bytes=40 * UNIT,
                merged_bytes=4000,
                max_model_len=128,
                max_step_tokens=128,
                max_chunk_tokens=128,
                prefix_cache=False,
            ),
            self.runner,
            base_digest="base",
            executor=InlineExecutor(),
            clock=lambda: self.runner.now,
        )
        self._adapters, self._numbers = adapters(skew), count()
        self._lengths = random.Random(3)
        self.tokens = 0
        for _ in range(STREAMS):
            self._ask()

    def seconds_a_token(self, steps: int) -> float:
        """Over the next steps."""
        begun, tokens = self.runner.now, self.tokens
        for _ in range(steps):
            for output in self.engine.step():
                self.tokens += len(output.tokens)
                if output.last:
                    assert output.error is None
                    self._ask()
        self.engine.check_integrity()
        return (self.runner.now - begun) / (self.tokens - tokens)

    def _ask(self) -> None:
        name = f"r{next(self._numbers)}"
        adapter = make_adapter(next(self._adapters), mode=self.mode)
        length = self._lengths.randint(8, 40)
        self.engine.add(make_request(name, range(8), adapter, max_tokens=length, arrival=0.0))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("skew", ["distinct", "uniform", "zipf", "skewed", "identical"])
def test_auto_is_no_worse_than_the_better_mode(machine: str, skew: str) -> None:
    seconds = {}
    for mode in AdapterMode:
        traffic = Traffic(MACHINES[machine], skew, mode)
        traffic.seconds_a_token(steps=STRIDE * REMEMBERED + 100)
        seconds[mode] = traffic.seconds_a_token(steps=2500)
        if mode is AUTO:
            paid = bool(traffic.runner.merged)
    assert seconds[AUTO] <= 1.03 * min(seconds[UNMERGED], seconds[MERGED])
    assert paid or seconds[UNMERGED] < 1.03 * seconds[MERGED]


@pytest.mark.parametrize("merge", [ZEROS, FEW], ids=["zeros", "few"])
@pytest.mark.parametrize(
    ("machine", "skew"), [("nf4 cpu", "identical"), ("bf16 cpu", "distinct"), ("gpu", "identical")]
)
def test_auto_knows_what_merging_makes_of_an_adapter(machine: str, skew: str, merge: Merge) -> None:
    seconds = {}
    for mode in AdapterMode:
        traffic = Traffic(MACHINES[machine], skew, mode, merge)
        traffic.seconds_a_token(steps=STRIDE * REMEMBERED + 100)
        seconds[mode] = traffic.seconds_a_token(steps=1000)
        merged = traffic.runner.merged if mode is AUTO else set()
    assert seconds[AUTO] <= 1.03 * min(seconds[UNMERGED], seconds[MERGED])
    if machine == "nf4 cpu":
        assert merged == ({digest("a0")} if merge is ZEROS else set()), "dense copies do not pay"


@pytest.mark.parametrize("seed", range(3))
def test_traffic_near_the_point_where_merging_pays_hurts_little(seed: int) -> None:
    seconds = {}
    for mode in AdapterMode:
        traffic = Traffic(BF16_CPU, "skewed", mode)
        traffic._adapters = adapters("skewed", seed)
        traffic.seconds_a_token(steps=STRIDE * REMEMBERED)
        seconds[mode] = traffic.seconds_a_token(steps=4000)
    assert seconds[AUTO] <= 1.03 * min(seconds[UNMERGED], seconds[MERGED])


def test_which_mode_is_better_depends_on_machine_and_traffic() -> None:
    def better(costs: StepCosts, skew: str) -> AdapterMode:
        return min(
            (UNMERGED, MERGED), key=lambda mode: Traffic(costs, skew, mode).seconds_a_token(300)
        )

    assert better(NF4_CPU, "distinct") is UNMERGED
    assert better(NF4_CPU, "identical") is UNMERGED
    assert better(BF16_CPU, "identical") is MERGED
    assert better(GPU, "identical") is MERGED
    assert better(GPU, "distinct") is UNMERGED


def test_no_copy_is_made_where_merging_never_pays() -> None:
    traffic = Traffic(NF4_CPU, "identical", AUTO)
    traffic.seconds_a_token(steps=500)
    assert traffic.runner.merged == set()


def test_a_copy_that_no_longer_pays_is_not_used() -> None:
    traffic = Traffic(BF16_CPU, "identical", AUTO)
    traffic.seconds_a_token(steps=500)
    assert traffic.runner.merged == {digest("a0")}
    traffic._adapters = adapters("distinct")
    traffic.seconds_a_token(steps=2 * STRIDE * REMEMBERED)
    modes = {s.adapter.mode for s in traffic.engine._scheduler.running if s.adapter}
    assert modes == {UNMERGED}
    traffic._adapters = adapters("identical")
    traffic.seconds_a_token(steps=3 * STRIDE * REMEMBERED)
    modes = {s.adapter.mode for s in traffic.engine._scheduler.running if s.adapter}
    assert modes == {MERGED}


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts((2, 4), (1.0, 2.0), (4.0, 5.0), (0.1, 0.1), 0.01)
    assert [costs.step_seconds(Mix(base=rows)) for rows in (1, 2, 3, 4, 8)] == [1, 1, 1.5, 2, 4]
    assert costs.step_seconds(Mix()) == 0.0
    assert costs.step_seconds(Mix(merged={"a": 3})) == 4.5
    assert costs.step_seconds(Mix(base=1, merged={"a": 3})) == pytest.approx(4.5 + 2.0)
    assert costs.step_seconds(Mix(merged={"a": 2, "b": 2})) == pytest.approx(2 * 4.0 + 2.0)
    unmerged = Mix(base=1, unmerged={"a": 1, "b": 2})
    assert costs.step_seconds(unmerged) == pytest.approx(2.0 + 0.1 + 0.01)


@pytest.mark.parametrize("takes_merged", [False, True])
def test_linears_that_an_adapter_leaves_alone_are_the_bases(takes_merged: bool) -> None:
    costs = StepCosts((1, 11), (1.0, 11.0), (20.0, 20.0), (4.0, 4.0), 2.0, takes_merged)
    merges = {"few": FEW, "zeros": ZEROS}

    def seconds(**rows: Any) -> float:
        return costs.step_seconds(Mix(**rows), merges)

    assert seconds(unmerged={"few": 2}) == pytest.approx(2.0 + 4.0 / 4)
    assert seconds(unmerged={"few": 1, "zeros": 1}) == pytest.approx(2.0 + (4.0 + 2.0) * 5 / 8)
    assert seconds(merged={"few": 2}) == pytest.approx(20.0 / 4 + 2.0 * 3 / 4)
    assert seconds(merged={"zeros": 2}) == pytest.approx(2.0)
    few, zeros = (5.0, 5.0) if takes_merged else (1.0 / 4 + 5.0 * 3 / 4, 1.0)
    assert seconds(base=1, merged={"few": 4}) == pytest.approx(20.0 / 4 + few)
    assert seconds(base=1, merged={"zeros": 4}) == pytest.approx(4.0 + zeros)
    assert costs.saved("zeros", Mix(unmerged={"zeros": 2}), merges) == pytest.approx(4.0)
    assert costs.saved("few", Mix(unmerged={"few": 2}), merges) < 0


def test_a_mix_counts_rows_by_adapter_and_mode() -> None:
    batch = Batch(
        tuple(
            chunk
            for name, mode, rows in [("a", UNMERGED, 3), ("a", MERGED, 2), ("b", UNMERGED, 1)]
            for chunk in chunks(name, mode, rows)
        )
        + tuple(chunks(None, UNMERGED, 4))
    )
    a, b = digest("a"), digest("b")
    mix = Mix.of(batch)
    assert mix == Mix(4, {a: 3, b: 1}, {a: 2})
    assert mix.rows(a) == 5
    assert mix.applied(a, MERGED) == Mix(4, {b: 1}, {a: 5})
    assert mix.applied(a, UNMERGED) == Mix(4, {a: 5, b: 1}, {})
    assert mix.applied("other", MERGED) == mix


rows_by_adapter = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), max_size=6)


@given(
    mix=st.builds(Mix, st.integers(0, 60), rows_by_adapter, rows_by_adapter),
    machine=st.sampled_from([*MACHINES.values()]),
    name=st.sampled_from("abcdefg"),
)
def test_what_merging_saves_is_the_difference(mix: Mix, machine: StepCosts, name: str) -> None:
    unmerged, merged = (
        machine.step_seconds(mix.applied(name, mode)) for mode in (UNMERGED, MERGED)
    )
    saved = machine.saved(name, mix)
    assert saved == unmerged - merged
    assert saved < unmerged or not mix.rows(name)
    if not mix.rows(name):
        assert saved == 0.0


def chunks(name: str | None, mode: AdapterMode, rows: int) -> Iterator[Chunk]:
    adapter = make_adapter(name, mode=mode) if name else None
    for _ in range(rows):
        yield Chunk(Sequence(make_request("r", [1], adapter)), 0, 1)


def remember(popularity: Popularity, name: str, steps: int) -> None:
    for _ in range(steps * STRIDE):
        popularity.note(Batch(tuple(chunks(name, UNMERGED, 8))))


def test_only_recent_steps_make_merging_pay() -> None:
    popularity = Popularity(BF16_CPU)
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
    popularity = Popularity(NF4_CPU)
    remember(popularity, "a", REMEMBERED)
    assert not popularity.pays(digest("a"))
    popularity.learn(digest("a"), ZEROS)
    assert popularity.pays(digest("a"))
    popularity.learn(digest("a"), None)
    assert not popularity.pays(digest("a"))


def test_without_costs_merging_never_pays() -> None:
    popularity = Popularity(None)
    remember(popularity, "a", REMEMBERED)
    assert not popularity.pays(digest("a"))


def test_rows_of_merged_adapters_may_be_spared_the_base() -> None:
    rows, seconds = (1, 16), (1.0, 16.0)
    flat = StepCosts(rows, seconds, (2.0, 2.0), (0.0, 0.0), 0.0)
    spared = replace(flat, base_takes_merged=False)
    mixed = Mix(base=4, merged={"a": 8})
    assert flat.step_seconds(mixed) == pytest.approx(2.0 + 12.0)
    assert spared.step_seconds(mixed) == pytest.approx(2.0 + 4.0)
    two = Mix(merged={"a": 4, "b": 4})
    assert flat.step_seconds(two) == pytest.approx(4.0 + 8.0)
    assert spared.step_seconds(two) == pytest.approx(4.0)
    alone = Mix(merged={"a": 8})
    assert flat.step_seconds(alone) == spared.step_seconds(alone) == pytest.approx(2.0)
