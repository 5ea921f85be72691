"""The files of deploy/, the metrics that the server exposes, and promtool."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from adaplex.adapters.program.traits import NO_TRAITS
from adaplex.adapters.storage.catalog import StoreUsage
from adaplex.engine.errors import QueueFull
from adaplex.engine.request import AdapterRef, Timing
from adaplex.engine.stats import EngineStats
from adaplex.server.metrics import Metrics, RpcMetrics
from adaplex.server.rpc_context import RpcContext
from time_limits import WAIT_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DIGEST = "sha256:" + "a" * 64
TARGET_LABELS = {"job", "instance", "le"}
"""Labels that Prometheus adds to every series, and the bounds of histograms."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    text = (DEPLOY / "grafana" / "dashboards" / "adaplex.json").read_text()
    return dict(json.loads(text))


@pytest.fixture(scope="session")
def alerts() -> list[dict[str, Any]]:
    groups = read_yaml(DEPLOY / "prometheus" / "alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return dict(read_yaml(DEPLOY / "compose.yaml"))


@pytest.fixture(scope="session")
def promtool_path() -> Path:
    done = subprocess.run(
        [DEPLOY / "get_promtool.sh"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    if done.returncode:
        pytest.fail(f"these tests need promtool.\n{done.stderr}", pytrace=False)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def promtool(promtool_path: Path) -> Run:
    """A function that runs promtool in deploy/prometheus."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [promtool_path, *arguments],
            cwd=DEPLOY / "prometheus",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )

    return run


def report_everything(metrics: Metrics, rpc: RpcMetrics) -> None:
    """Reports one event of each kind."""
    metrics.stepped(rows=8)
    metrics.preempted()
    metrics.prefix_looked_up(tokens=32, hits=16)
    metrics.adapter_loaded(cache="arena", outcome="ok", seconds=0.01)
    metrics.adapter_loaded(cache="arena", outcome="error", seconds=0.01)
    metrics.adapter_evicted(cache="arena")
    metrics.merged_looked_up(hit=True)
    metrics.request_admitted(AdapterRef("poet", 1, DIGEST, 1024, NO_TRAITS), 32)
    metrics.request_rejected(QueueFull(1, 1.0))
    metrics.tokens_generated(1, [0.02])
    metrics.request_ended("stop", 4, Timing(queued=0.01, first_token=0.05, total=0.2))
    metrics.request_ended("error", 0, None)
    call = RpcContext("adaplex.v1.GenerationService", "Generate", "unary", "id", 0.0, None)
    for code in ("OK", "INTERNAL"):
        rpc.started(call)
        rpc.handled(call, code, 0.2)


class SharedStore:
    """The part of a registry with a remote store that the gauges use."""

    names = SimpleNamespace(usage=lambda: StoreUsage(names=1, stored_bytes=2))

    def cached_bytes(self) -> int:
        return 1


class ServerMetrics:
    """Every metric of the server, each with at least one series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._metrics = Metrics(self.registry, model_name="tiny")
        self._rpc = RpcMetrics(self.registry)
        stats = EngineStats(running=1, kv_blocks_total=8, resident=frozenset({DIGEST}))
        self._metrics.watch(lambda: stats, max_lora=8)
        self._metrics.watch_store(SharedStore(), store_bytes=9, cache_bytes=9)  # type: ignore[arg-type]
        self.report()

    def report(self) -> None:
        """Reports one more event of each kind."""
        report_everything(self._metrics, self._rpc)


@pytest.fixture(scope="session")
def exposed() -> dict[str, set[str]]:
    """Labels by name of series, including suffixes."""
    found: dict[str, set[str]] = {}
    for family in ServerMetrics(CollectorRegistry()).registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
