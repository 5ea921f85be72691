"""The scrape configuration and the alert rules, checked by promtool."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.conftest import DEPLOY, TARGET_LABELS, Run, read_yaml
from deploy.promql import groupings, metrics_in, selectors

PROMETHEUS_METRICS = {"up": {"job", "instance"}}

PROMETHEUS = DEPLOY / "prometheus"
ALERTS = [
    rule["alert"]
    for group in read_yaml(PROMETHEUS / "alerts.yml")["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("name", ["prometheus.yml", "network.yml"])
def test_configuration_is_valid(name: str, promtool: Run) -> None:
    syntax = ["--syntax-only"] if name == "network.yml" else []  # the token is elsewhere
    done = promtool("check", "config", *syntax, name)
    assert done.returncode == 0, done.stdout
    assert syntax or "1 rule files found" in done.stdout


def test_the_network_configuration_differs_by_credentials_alone() -> None:
    plain, network = (read_yaml(PROMETHEUS / name) for name in ("prometheus.yml", "network.yml"))
    job = network["scrape_configs"][0]
    assert job.pop("scheme") == "https"
    assert job.pop("authorization")["credentials_file"].startswith("/run/adaplex/")
    assert job.pop("tls_config")["ca_file"].startswith("/run/adaplex/")
    assert network == plain


def test_rules_are_valid(promtool: Run) -> None:
    done = promtool("check", "rules", "alerts.yml")
    assert done.returncode == 0, done.stdout
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_rules_pass_their_scenarios(promtool: Run) -> None:
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("expression", "side"), [("vector(0) > 1", "exp"), ("vector(1)", "got")])
def test_scenarios_fail_for_rules_that_never_or_always_fire(
    promtool: Run, tmp_path: Path, expression: str, side: str
) -> None:
    """Each alert is reported as missing where it should fire, and as extra where it should not."""
    rules = read_yaml(PROMETHEUS / "alerts.yml")
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(PROMETHEUS / "alerts_test.yml", tmp_path)

    done = promtool("test", "rules", tmp_path / "alerts_test.yml")

    assert done.returncode != 0
    noticed = {
        name
        for line in done.stdout.splitlines()
        if line.strip().startswith(side)
        for name in re.findall(r'alertname="(\w+)"', line)
    }
    assert noticed == set(ALERTS)


def test_every_alert_has_a_severity_and_a_runbook(alerts: list[dict[str, Any]]) -> None:
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        name = rule["alert"]
        assert name.startswith("Adaplex"), name
        assert rule["for"], name
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert {"summary", "description", "runbook"} == rule["annotations"].keys(), name


def test_alerts_read_metrics_that_the_server_exposes(
    alerts: list[dict[str, Any]], exposed: dict[str, set[str]]
) -> None:
    known = exposed | PROMETHEUS_METRICS
    for rule in alerts:
        assert metrics_in(rule["expr"]) <= known.keys(), rule["alert"]


def test_alerts_use_labels_that_their_metrics_have(
    alerts: list[dict[str, Any]], exposed: dict[str, set[str]]
) -> None:
    known = exposed | PROMETHEUS_METRICS
    for rule in alerts:
        for metric, matched in selectors(rule["expr"]):
            assert matched <= known[metric] | TARGET_LABELS, (rule["alert"], metric)
            assert groupings(rule["expr"]) <= known[metric] | TARGET_LABELS, (rule["alert"], metric)


def test_scraped_job_is_the_one_that_the_alerts_watch(compose: dict[str, Any]) -> None:
    (job,) = (
        job
        for job in read_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]
        if job["job_name"] == "adaplex"
    )
    port = compose["services"]["server"]["environment"]["ADAPLEX_HTTP_PORT"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert 'up{job="adaplex"}' in (PROMETHEUS / "alerts.yml").read_text()
