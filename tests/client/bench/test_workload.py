from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from statistics import mean, pstdev

import numpy as np
import pytest

from adaplex.client.bench.workload import (
    MIXES,
    Prompts,
    Trace,
    adapter_indices,
    index_sampler,
    power_law_index,
    streams_per_adapter,
)


@pytest.mark.parametrize(
    ("mix", "streams", "expected"),
    [
        ("base", 8, []),
        ("identical", 8, [8]),
        ("distinct", 3, [1, 1, 1]),
        ("uniform", 8, [3, 3, 2]),
        ("uniform", 16, [4, 4, 4, 4]),
        # 1, 1.5, 2.25, 3.375, 5.06 rounded down; the last gets the remainder of 16.
        ("zipf", 16, [5, 4, 3, 2, 1, 1]),
        ("zipf", 1, [1]),
    ],
)
def test_popularities_are_those_of_punica(mix: str, streams: int, expected: list[int]) -> None:
    assert sorted(streams_per_adapter(mix, streams), reverse=True) == sorted(expected, reverse=True)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("streams", [1, 2, 7, 8, 16, 32, 100])
def test_every_stream_has_one_adapter_or_the_base(mix: str, streams: int) -> None:
    chosen = adapter_indices(mix, streams)
    assert len(chosen) == streams
    assert (set(chosen) == {None}) == (mix == "base")
    assert sum(streams_per_adapter(mix, streams)) == (0 if mix == "base" else streams)


def test_an_unknown_mix_is_named() -> None:
    with pytest.raises(ValueError, match="mix: 'skewed' is not one of base, identical"):
        streams_per_adapter("skewed", 4)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1])
def test_adapters_follow_numpys_power_law(alpha: float) -> None:
    rng, draws, count = random.Random(1), 20_000, 10
    ours = Counter(power_law_index(alpha, count, rng) for _ in range(draws))
    theirs = Counter((np.random.RandomState(1).power(alpha, draws) * count).astype(int).tolist())
    for index in range(count):
        assert ours[index] / draws == pytest.approx(theirs[index] / draws, abs=0.02)


def test_a_power_law_never_leaves_its_range() -> None:
    class Top(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    assert power_law_index(1000.0, 2000, Top()) == 1999


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_given_rate_and_variation(cv: float) -> None:
    trace = Trace(rate=50.0, cv=cv, seconds=200.0, inputs=(1, 2), outputs=(1, 2))
    times = [request.at for request in trace.requests(["a"], Prompts(100, 0), seed=3)]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert len(times) == 10_000
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv, abs=0.1 * cv + 1e-9)


def test_lengths_fill_their_range_and_leave_its_end_out() -> None:
    requests = Trace(rate=100.0, seconds=50.0, inputs=(8, 12), outputs=(3, 6)).requests(
        ["a"], Prompts(100, 0), seed=0
    )
    assert {len(request.prompt) for request in requests} == {8, 9, 10, 11}
    assert {request.output for request in requests} == {3, 4, 5}


def test_the_same_seed_gives_the_same_trace_and_another_one_another() -> None:
    def traced(seed: int) -> object:
        return Trace(seconds=20.0).requests(["a", "b"], Prompts(1000, seed), seed)

    assert traced(1) == traced(1)
    assert traced(1) != traced(2)


def test_no_prompt_is_repeated() -> None:
    prompts = Prompts(50_000, 42)
    drawn = [prompts.draw(16) for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert all(0 <= token < 50_000 for prompt in drawn for token in prompt)


def test_zipf_draws_fall_with_the_rank() -> None:
    draw = index_sampler("zipf", 4, random.Random(0))
    counts = sorted(Counter(draw() for _ in range(20_000)).values(), reverse=True)
    ratios = [counts[0] / count for count in counts]
    assert ratios == pytest.approx([1, 2**1.5, 3**1.5, 4**1.5], rel=0.15)


def test_uniform_draws_are_alike() -> None:
    draw = index_sampler("uniform", 4, random.Random(0))
    counts = Counter(draw() for _ in range(20_000))
    assert [counts[i] / 5000 for i in range(4)] == pytest.approx([1] * 4, rel=0.05)


def test_a_short_trace_has_one_request() -> None:
    trace = replace(Trace(), rate=0.1, seconds=1.0)
    assert len(trace.requests(["a"], Prompts(10, 0), seed=0)) == 1
