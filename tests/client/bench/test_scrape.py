from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from adaplex.client.bench.scrape import Scrape, quantile
from adaplex.client.errors import Unavailable
from adaplex.server.metrics import Metrics


def scraped(registry: CollectorRegistry) -> Scrape:
    return Scrape.parse(generate_latest(registry).decode())


def test_swaps_are_the_difference_of_two_scrapes_of_the_servers_metrics() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, model_name='a "quoted", name')
    metrics.adapter_loaded(cache="arena", outcome="ok", seconds=5.0)
    before = scraped(registry)
    for seconds in (0.003, 0.004, 0.02):
        metrics.adapter_loaded(cache="arena", outcome="ok", seconds=seconds)
    metrics.adapter_evicted(cache="arena")
    metrics.adapter_evicted(cache="merged")
    swaps = scraped(registry).since(before).swaps()
    assert set(swaps) == {"arena", "merged"}
    arena = swaps["arena"]
    assert (arena.loads, arena.evictions) == (3, 1)
    assert arena.mean == pytest.approx(9.0)
    assert 2.5 <= arena.p50 <= 5 < 10 <= arena.p99 <= 25
    assert (swaps["merged"].loads, swaps["merged"].evictions) == (0, 1)
    assert swaps["merged"].p99 == 0


def test_equal_scrapes_have_no_swaps() -> None:
    registry = CollectorRegistry()
    Metrics(registry, model_name="m")
    assert scraped(registry).since(scraped(registry)).swaps() == {}


def test_samples_are_read_with_their_labels() -> None:
    found = Scrape.parse('# HELP x y\nx{a="1",b="}, \\"q\\""} 2.5 123\nx 1e3\nx_sum NaN\n')
    assert list(found.values("x", a="1")) == [({"a": "1", "b": '}, \\"q\\"'}, 2.5)]
    assert found.total("x") == 1002.5


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0)])
def test_quantiles_are_prometheus(share: float, expected: float) -> None:
    assert quantile([(1.0, 2.0), (2.0, 4.0), (float("inf"), 4.0)], share) == expected


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert quantile([(1.0, 1.0), (float("inf"), 10.0)], 0.9) == 1.0
    assert quantile([], 0.5) == 0.0


def test_an_absent_server_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no metrics at http://127"):
        Scrape.read("http://127.0.0.1:1/metrics")
