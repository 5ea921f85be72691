from __future__ import annotations

import numpy as np
import pytest

from adaplex.client.bench.load import LoadGenerator, RequestResult, for_seconds
from adaplex.client.bench.measures import Measurement, Percentiles, percentile
from adaplex.client.bench.workload import BenchRequest, Prompts

REQUEST = BenchRequest("a", (1, 2), 3)


def result(
    first: float | None, *, sent: float = 0.0, gaps: tuple[float, ...] = (), error: str = ""
) -> RequestResult:
    """Returns a result whose tokens arrived at these times."""
    times = [] if first is None else [sent + first]
    for gap in gaps:
        times.append(times[-1] + gap)
    ended = max([sent + 0.1, *times])
    return RequestResult(REQUEST, sent, tuple((time, 1) for time in times), ended, error)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_numpys(count: int, share: float) -> None:
    values = sorted(np.random.RandomState(count).rand(count).tolist())
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_percentiles_are_in_milliseconds_and_none_without_values() -> None:
    found = Percentiles.of([0.003, 0.001, 0.002])
    assert found
    assert (found.count, found.p50, found.max) == (3, pytest.approx(2.0), pytest.approx(3.0))
    assert found.mean == pytest.approx(2.0)
    assert Percentiles.of([]) is None


def test_rates_are_over_the_whole_run() -> None:
    results = [result(1.0, gaps=(0.5, 0.5)), result(0.5, sent=2.0, gaps=(1.5,))]
    found = Measurement.of(results, 6.0)
    assert (found.seconds, found.output_tokens) == (4.0, 5)
    assert (found.tokens_per_second, found.requests_per_second) == (1.25, 0.5)
    assert found.first_token
    assert found.inter_token
    assert found.first_token.p50 == pytest.approx(750)
    assert (found.inter_token.count, found.inter_token.p50) == (3, pytest.approx(500))


def test_tokens_that_arrive_together_are_one_gap() -> None:
    together = RequestResult(REQUEST, 0.0, ((1.0, 2), (3.0, 3)), 3.0)
    found = Measurement.of([together], 6.0)
    assert found.output_tokens == 5
    assert found.inter_token
    assert (found.inter_token.count, found.inter_token.p50) == (1, pytest.approx(2000))


def test_a_late_reader_changes_gaps_but_not_the_time_per_token() -> None:
    steady = result(1.0, gaps=(1.0, 1.0, 1.0))
    late = result(1.0, gaps=(2.998, 0.001, 0.001))
    assert steady.per_token == pytest.approx(1.0)
    found = Measurement.of([late], 6.0)
    assert found.inter_token
    assert found.per_token
    assert found.inter_token.p50 == pytest.approx(1.0)
    assert (found.per_token.count, found.per_token.p50) == (1, pytest.approx(1000))
    assert RequestResult(REQUEST, 0.0, ((1.0, 2), (3.0, 4)), 3.0).per_token == pytest.approx(0.5)
    assert result(1.0).per_token is result(None).per_token is None


def test_attainment_counts_finished_requests_within_the_bound() -> None:
    results = [
        result(0.5),
        result(1.0),
        result(1.1),  # too late
        result(0.1, error="CANCELLED"),  # begun in time, then aborted
        result(None, error="QUEUE_FULL"),
    ]
    found = Measurement.of(results, 1.0)
    assert found.attainment == pytest.approx(2 / 5)
    assert found.errors == {"CANCELLED": 1, "QUEUE_FULL": 1}
    assert found.failed == 2


def test_a_measurement_needs_results() -> None:
    with pytest.raises(ValueError, match="no request was sent"):
        Measurement.of([], 1.0)


async def test_a_closed_loop_sends_one_request_at_a_time_in_each_stream() -> None:
    running, most, order = 0, 0, []

    async def send(request: BenchRequest) -> RequestResult:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(request.adapter)
        running -= 1
        return RequestResult(request, 0.0, ((1.0, 1),), 1.0)

    reported: list[RequestResult] = []
    load = LoadGenerator(send, reported.append)
    streams = [[BenchRequest(f"s{i}-{n}", (1,), 1) for n in range(3)] for i in range(2)]
    await load.run_closed(streams)
    assert most <= 2
    assert reported == load.results
    for i in range(2):
        own = [name for name in order if name and name.startswith(f"s{i}")]
        assert own == [f"s{i}-0", f"s{i}-1", f"s{i}-2"]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    import asyncio

    all_sent, sent = asyncio.Event(), []

    async def send(request: BenchRequest) -> RequestResult:
        sent.append(request.at)
        if len(sent) == 3:
            all_sent.set()
        await all_sent.wait()  # a loop that waited for the first would never send the third
        return RequestResult(request, 0.0, (), 0.0)

    load = LoadGenerator(send)
    await load.run_open([BenchRequest(None, (1,), 1, at) for at in (0.0, 0.001, 0.002)])
    assert sent == [0.0, 0.001, 0.002]
    assert len(load.results) == 3


def test_requests_end_after_the_seconds() -> None:
    endless = Prompts(10, 0).requests("a", 2, 1)
    assert list(for_seconds(endless, -1.0)) == []
    assert next(iter(for_seconds(endless, 60.0))).adapter == "a"
