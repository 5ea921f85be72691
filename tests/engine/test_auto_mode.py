"""`auto` against the two fixed modes, on machines whose steps take modelled times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

import pytest

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.auto_merge import STRIDE, WINDOW
from adaplex.engine.batch import Batch
from adaplex.engine.engine import Engine
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts, StepRows
from adaplex.engine.request import AdapterMode, SampledToken
from engine.fakes import UNIT, InlineExecutor, digest, make_adapter, make_config, make_request
from engine.machines import (
    AUTO,
    BF16_CPU,
    DENSE,
    FEW,
    GPU,
    MACHINES,
    MERGED,
    NF4_CPU,
    UNMERGED,
    ZEROS,
)
from fake_runner import FakeRunner, FakeSource

pytestmark = pytest.mark.slow

STREAMS = 8


def adapters(skew: str, seed: int = 7) -> Iterator[str]:
    """Yields the adapter of each request."""
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
    """Advances a clock by modelled seconds, for adapters that all merge alike."""

    def __init__(self, costs: StepCosts, merge: FoldedShare) -> None:
        super().__init__()
        self.costs, self.merge = costs, merge

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        return self.merge

    def step_costs(self) -> StepCosts:
        return self.costs

    def run(self, batch: Batch) -> list[SampledToken]:
        rows = StepRows.of(batch)
        shares = dict.fromkeys(rows.merged | rows.unmerged, self.merge)
        self.now += self.costs.step_seconds(rows, shares)
        for chunk in batch.chunks:
            self._check_adapter(chunk)
        return [SampledToken(1) for _ in batch.sampling]


class Traffic:
    """STREAMS concurrent requests; each is followed by another when it ends."""

    def __init__(
        self, costs: StepCosts, skew: str, mode: AdapterMode, merge: FoldedShare = DENSE
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
            FakeSource(),
            base_digest="base",
            executor=InlineExecutor(),
            clock=lambda: self.runner.now,
        )
        self._adapters, self._numbers = adapters(skew), count()
        self._lengths = random.Random(3)
        self.tokens = 0
        for _ in range(STREAMS):
            self._add_request()

    def seconds_a_token(self, steps: int) -> float:
        """Runs steps; returns their mean seconds a token."""
        begun, tokens = self.runner.now, self.tokens
        for _ in range(steps):
            for output in self.engine.step():
                self.tokens += len(output.tokens)
                if output.last:
                    assert output.error is None
                    self._add_request()
        self.engine.check_integrity()
        return (self.runner.now - begun) / (self.tokens - tokens)

    def _add_request(self) -> None:
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
        traffic.seconds_a_token(steps=STRIDE * WINDOW + 100)
        seconds[mode] = traffic.seconds_a_token(steps=1500)
        if mode is AUTO:
            paid = bool(traffic.runner.merged)
    assert seconds[AUTO] <= 1.03 * min(seconds[UNMERGED], seconds[MERGED])
    assert paid or seconds[UNMERGED] < 1.03 * seconds[MERGED]


@pytest.mark.parametrize("merge", [ZEROS, FEW], ids=["zeros", "few"])
@pytest.mark.parametrize(
    ("machine", "skew"), [("nf4 cpu", "identical"), ("bf16 cpu", "distinct"), ("gpu", "identical")]
)
def test_auto_knows_what_merging_makes_of_an_adapter(
    machine: str, skew: str, merge: FoldedShare
) -> None:
    seconds = {}
    for mode in AdapterMode:
        traffic = Traffic(MACHINES[machine], skew, mode, merge)
        traffic.seconds_a_token(steps=STRIDE * WINDOW + 100)
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
        traffic.seconds_a_token(steps=STRIDE * WINDOW)
        seconds[mode] = traffic.seconds_a_token(steps=2500)
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
    traffic.seconds_a_token(steps=2 * STRIDE * WINDOW)
    modes = {s.adapter.mode for s in traffic.engine._scheduler.running if s.adapter}
    assert modes == {UNMERGED}
    traffic._adapters = adapters("identical")
    traffic.seconds_a_token(steps=3 * STRIDE * WINDOW)
    modes = {s.adapter.mode for s in traffic.engine._scheduler.running if s.adapter}
    assert modes == {MERGED}
