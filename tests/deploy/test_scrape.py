"""A real Prometheus scrapes the server's HTTP port and evaluates the dashboard's queries."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric

from adaplex.client.local import free_port
from adaplex.server.http import HttpServer
from deploy.conftest import DEPLOY, ServerMetrics, read_yaml
from deploy.promql import as_prometheus
from deploy.test_dashboard import Json, queries_of
from time_limits import WAIT_SECONDS

Query = Callable[..., Any]
SCRAPES = 5
SCRAPED = f'count_over_time(up{{job="adaplex"}}[1h]) >= {SCRAPES}'
POLL_SECONDS = 1.0
"""Interval at which the process is polled while the test waits for a scrape."""


def api_of(port: int) -> Query:
    """Returns a function that calls Prometheus' HTTP API, and returns None until it is ready."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with direct.open(url, timeout=WAIT_SECONDS) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # it listens before it is ready
                return None
            raise AssertionError(error.read().decode()) from error
        except OSError:
            return None

    return call


class CountedRegistry(CollectorRegistry):
    """Metrics that count how often they are scraped."""

    def __init__(self) -> None:
        super().__init__()
        self.scrapes = threading.Semaphore(0)
        """Released by each scrape."""

    def collect(self) -> Iterable[Metric]:
        """Returns every metric."""
        self.scrapes.release()
        return super().collect()


class Prometheus:
    """A Prometheus on loopback that scrapes `registry`; `call` calls its HTTP API."""

    def __init__(self, binary: Path, config: Json, folder: Path, registry: CountedRegistry) -> None:
        file, self._log, port = folder / "prometheus.yml", folder / "log", free_port()
        file.write_text(yaml.safe_dump(config))
        self._registry, self.call = registry, api_of(port)
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=output,
                stderr=output,
            )

    def wait_scraped(self) -> None:
        """Waits for the next scrape. Fails with the log if the process has ended."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._registry.scrapes.acquire(timeout=POLL_SECONDS):
            if self._process.poll() is not None:
                pytest.fail(self._log.read_text())
            if time.monotonic() > deadline:
                pytest.fail(f"no scrape in {WAIT_SECONDS:g} s: {self._log.read_text()}")

    def wait_for(self, condition: Callable[[Any], bool], path: str, **parameters: str) -> Any:
        """Calls the API after every scrape until the answer meets the condition; returns it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (answer := self.call(path, **parameters)) is None or not condition(answer):
            if time.monotonic() > deadline:
                pytest.fail(f"{path}: still {answer} after {WAIT_SECONDS:g} s")
            self.wait_scraped()
        return answer

    def stop(self) -> None:
        """Terminates the process."""
        self._process.terminate()
        self._process.wait(WAIT_SECONDS)


@pytest.fixture(scope="module")
def prometheus(
    promtool_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus with the repository's configuration that scrapes the server's HTTP port every
    200 ms, once it has SCRAPES samples.
    """
    registry = CountedRegistry()
    metrics = ServerMetrics(registry)
    server = HttpServer("127.0.0.1", 0, registry, lambda: True)
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    config["global"] = dict.fromkeys(config["global"], "200ms")
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
    binary, folder = promtool_path.with_name("prometheus"), tmp_path_factory.mktemp("prometheus")
    started = Prometheus(binary, config, folder, registry)
    try:
        for _ in range(SCRAPES):
            started.wait_scraped()
            metrics.report()
        started.wait_for(lambda answer: bool(answer["result"]), "query", query=SCRAPED)
        yield started
    finally:
        started.stop()
        server.close()


def test_target_is_up(prometheus: Prometheus) -> None:
    def up(answer: Any) -> bool:
        return [(t["health"], t["lastError"]) for t in answer["activeTargets"]] == [("up", "")]

    prometheus.wait_for(up, "targets")


def test_rules_can_be_evaluated(prometheus: Prometheus) -> None:
    def evaluated(answer: Any) -> bool:
        rules = [rule for group in answer["groups"] for rule in group["rules"]]
        return bool(rules) and {rule["health"] for rule in rules} == {"ok"}

    prometheus.wait_for(evaluated, "rules")


def test_every_panel_has_data(prometheus: Prometheus, dashboard: Json) -> None:
    empty = [
        (title, expression)
        for title, expression in queries_of(dashboard)
        if not prometheus.call("query", query=as_prometheus(expression))["result"]
    ]
    assert empty == []


def test_adapters_can_be_chosen(prometheus: Prometheus) -> None:
    assert prometheus.call("label/adapter/values") == ["poet"]
