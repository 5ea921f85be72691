from __future__ import annotations

import gzip
import http.client
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

from adaplex.engine.stats import EngineStats
from adaplex.server.http import HttpServer
from adaplex.server.metric_table import METRICS
from adaplex.server.metrics import Metrics, RpcMetrics, scraped_registry
from time_limits import WAIT_SECONDS

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""The header that Prometheus 3 sends with a scrape."""


@dataclass
class Port:
    """The HTTP port of a server that is ready or not."""

    number: int = 0
    ready: bool = True
    registry: CollectorRegistry = field(default_factory=scraped_registry)

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.number, timeout=WAIT_SECONDS)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


@pytest.fixture
def port() -> Iterator[Port]:
    found = Port()
    metrics = Metrics(found.registry, model_name="toy", vllm_names=True)
    metrics.watch(EngineStats, max_lora=4)
    RpcMetrics(found.registry)
    server = HttpServer("127.0.0.1", 0, found.registry, lambda: found.ready)
    found.number = server.port
    yield found
    server.close()


@pytest.mark.parametrize("path", ["/metrics", "/health", "/metrics/", "/health/", "/health?x=1"])
def test_head_has_the_headers_of_get_and_no_body(port: Port, path: str) -> None:
    status, headers, body = port.ask("GET", path)
    assert (status, len(body)) == (200, int(headers["Content-Length"]))
    assert body
    status, of_head, nothing = port.ask("HEAD", path)
    assert (status, nothing) == (200, b"")
    assert of_head["Content-Type"] == headers["Content-Type"]
    assert int(of_head["Content-Length"]) > 0


def test_health_says_when_the_server_is_not_ready(port: Port) -> None:
    port.ready = False
    assert port.ask("GET", "/health")[::2] == (503, b"not serving\n")
    assert port.ask("HEAD", "/health")[::2] == (503, b"")


@pytest.mark.parametrize("path", ["/metrics", "/health"])
def test_other_methods_are_told_which_there_are(port: Port, path: str) -> None:
    status, headers, body = port.ask("OPTIONS", path)
    assert (status, headers["Allow"], body) == (200, "GET, HEAD, OPTIONS", b"")
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        status, headers, _ = port.ask(method, path)
        assert (status, headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_other_pages_are_not_found_by_any_method(port: Port, method: str) -> None:
    status, _, body = port.ask(method, "/metrics/x")
    assert (status, body) == (404, b"" if method == "HEAD" else b"not found\n")


def test_a_scrape_of_prometheus_is_answered_in_openmetrics_and_compressed(port: Port) -> None:
    asked = {"Accept": PROMETHEUS, "Accept-Encoding": "gzip"}
    status, headers, body = port.ask("GET", "/metrics", asked)
    assert (status, headers["Content-Encoding"]) == (200, "gzip")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    text = gzip.decompress(body).decode()
    assert text.endswith("# EOF\n")
    names = {family.name for family in open_families(text)}
    assert "adaplex_num_requests_running" in names
    assert port.ask("HEAD", "/metrics", asked)[::2] == (200, b"")


@pytest.mark.parametrize("accept", [None, "*/*", "text/plain", "text/plain;version=0.0.4"])
def test_other_scrapes_are_answered_in_plain_text(port: Port, accept: str | None) -> None:
    _, headers, body = port.ask("GET", "/metrics", {"Accept": accept} if accept else {})
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert list(plain_families(body.decode()))


def test_every_sample_can_be_asked_for_alone(port: Port) -> None:
    _, _, body = port.ask("GET", "/metrics")
    families = list(plain_families(body.decode()))
    assert len(families) > len(METRICS) // 2
    names = {sample.name for family in families for sample in family.samples}
    for name in names:
        _, _, body = port.ask("GET", f"/metrics?name[]={name}")
        found = {s.name for family in plain_families(body.decode()) for s in family.samples}
        assert found == {name}
    first, second = sorted(names)[:2]
    _, _, body = port.ask("GET", f"/metrics?name%5B%5D={first}&name[]={second}&name[]=nothing")
    found = {s.name for family in plain_families(body.decode()) for s in family.samples}
    assert found == {first, second}
