"""A real Prometheus scrapes the server's own HTTP port and answers the dashboard's queries."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaplex.client.local import free_port
from adaplex.server.http import HttpServer
from deploy.conftest import DEPLOY, ServerMetrics, read_yaml
from deploy.promql import as_prometheus
from deploy.test_dashboard import Json, queries_of

Ask = Callable[..., Any]
SCRAPED = 'count_over_time(up{job="adaplex"}[1m]) >= 5'


def asker(port: int) -> Ask:
    """Calls Prometheus' HTTP API; None while it does not answer, or is not ready."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with direct.open(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # it listens before it is ready
                return None
            raise AssertionError(error.read().decode()) from error
        except OSError:
            return None

    return ask


@contextmanager
def running(binary: Path, config: Json, folder: Path) -> Iterator[tuple[Ask, Callable[[], str]]]:
    """A Prometheus on loopback: how to ask it, and what is wrong with it, if anything."""
    file, log, port = folder / "prometheus.yml", folder / "log", free_port()
    file.write_text(yaml.safe_dump(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
        )
    try:
        yield asker(port), lambda: "" if process.poll() is None else log.read_text()
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def prometheus(promtool_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Our configuration, scraping our HTTP port every 200 ms; yields once rates can be had."""
    metrics = ServerMetrics()
    server = HttpServer("127.0.0.1", 0, metrics.registry, lambda: True)
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    config["global"] = dict.fromkeys(config["global"], "200ms")
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
    binary = promtool_path.with_name("prometheus")
    deadline = time.monotonic() + 30
    try:
        with running(binary, config, tmp_path_factory.mktemp("prometheus")) as (ask, fault):
            while not (ask("query", query=SCRAPED) or {}).get("result"):
                if fault() or time.monotonic() > deadline:
                    pytest.fail(fault() or "Prometheus scraped nothing in 30 seconds")
                metrics.move()
                time.sleep(0.05)
            yield ask
    finally:
        server.close()


def test_target_is_up(prometheus: Ask) -> None:
    (target,) = prometheus("targets")["activeTargets"]
    assert target["lastError"] == ""
    assert target["health"] == "up"


def test_rules_can_be_evaluated(prometheus: Ask) -> None:
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert rules
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}


def test_every_panel_has_data(prometheus: Ask, dashboard: Json) -> None:
    empty = [
        (title, expression)
        for title, expression in queries_of(dashboard)
        if not prometheus("query", query=as_prometheus(expression))["result"]
    ]
    assert empty == []


def test_adapters_can_be_chosen(prometheus: Ask) -> None:
    assert prometheus("label/adapter/values") == ["poet"]
