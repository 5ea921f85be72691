"""The Grafana dashboard: layout, variables, and queries of metrics that exist."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy.conftest import DEPLOY, TARGET_LABELS, Run, read_yaml
from deploy.promql import as_prometheus, groupings, metrics_in, selectors

Json = dict[str, Any]
NOT_SHOWN = {"adaplex_lora_requests_info"}
"""For inference gateways; its labels are lists of names."""


def panels_of(dashboard: Json) -> Iterator[Json]:
    """Returns the panels that are not rows."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def queries_of(dashboard: Json) -> Iterator[tuple[str, str]]:
    """Yields panel title and expression of each query."""
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def cells(panel: Json) -> set[tuple[int, int]]:
    """Returns the cells of the grid that a panel covers."""
    at = panel["gridPos"]
    return set(
        itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    )


def test_identity_is_fixed(dashboard: Json) -> None:
    assert dashboard["uid"] == "adaplex"
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] >= 39


def test_rows_go_from_overview_to_detail(dashboard: Json) -> None:
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Traffic", "Latency", "Engine", "Adapters", "gRPC"]


def test_panels_fill_the_grid_without_overlap(dashboard: Json) -> None:
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert not covered & cells(panel), panel["title"]
        covered |= cells(panel)
    height = max(y for _, y in covered) + 1
    assert covered == set(itertools.product(range(24), range(height)))


def test_every_panel_has_a_description_and_a_unit(dashboard: Json) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels_of(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "heatmap" or panel["fieldConfig"]["defaults"]["unit"]


def test_every_query_goes_to_the_chosen_data_source(dashboard: Json) -> None:
    for panel in panels_of(dashboard):
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}, panel["title"]


def test_variables_are_defined_and_used(dashboard: Json) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "model_name", "instance", "adapter"}
    everything = " ".join(expression for _, expression in queries_of(dashboard))
    for name in variables - {"datasource"}:
        assert f'=~"${name}"' in everything
    assert "$" not in as_prometheus(everything)


def test_every_query_is_filtered_by_server(dashboard: Json) -> None:
    for title, expression in queries_of(dashboard):
        for metric, matched in selectors(expression):
            assert "instance" in matched, (title, metric)
            if metric.startswith("adaplex_"):
                assert "model_name" in matched, (title, metric)


def test_queries_are_valid(dashboard: Json, promtool: Run, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": as_prometheus(expression)}
        for number, (_, expression) in enumerate(queries_of(dashboard))
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    done = promtool("check", "rules", file)

    assert done.returncode == 0, done.stdout
    assert f"{len(rules)} rules found" in done.stdout


def test_queries_read_metrics_and_labels_that_the_server_exposes(
    dashboard: Json, exposed: dict[str, set[str]]
) -> None:
    for title, expression in queries_of(dashboard):
        assert metrics_in(expression) <= exposed.keys(), title
        for metric, matched in selectors(expression):
            labels = exposed[metric] | TARGET_LABELS
            assert matched <= labels, (title, metric)
            assert groupings(expression) <= labels, (title, metric)


def test_variables_list_values_of_metrics_that_the_server_exposes(
    dashboard: Json, exposed: dict[str, set[str]]
) -> None:
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = variable["query"]["query"][len("label_values(") : -1].rsplit(", ", 1)
            (metric,) = metrics_in(series)
            assert label in exposed[metric] | TARGET_LABELS, variable["name"]


def test_every_metric_of_the_server_is_shown(dashboard: Json, exposed: dict[str, set[str]]) -> None:
    read = {name for _, expression in queries_of(dashboard) for name in metrics_in(expression)}
    families = {name for name in exposed if not name.endswith(("_bucket", "_sum", "_created"))}
    families -= NOT_SHOWN

    unseen = {
        name
        for name in families
        if name not in read and not {name.removesuffix("_count") + "_bucket"} & read
    }

    assert unseen == set()


def test_provisioning_finds_the_dashboard_and_prometheus(compose: Json) -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    (provider,) = read_yaml(provisioning / "dashboards" / "adaplex.yml")["providers"]
    mounts = {
        target: host
        for host, target, _ in (
            volume.split(":") for volume in compose["services"]["grafana"]["volumes"][:2]
        )
    }

    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert (DEPLOY / mounts["/etc/grafana/provisioning"]).samefile(provisioning)
    folder = DEPLOY / mounts[provider["options"]["path"]]
    assert [file.name for file in folder.iterdir()] == ["adaplex.json"]
    scrape = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
