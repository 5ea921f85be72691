"""The generated documents match the code, and a drift of any of them is found and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from adaplex.engine.stats import EngineStats
from adaplex.server.config import ServerConfig
from adaplex.server.metric_table import LABELS, METRICS, RPC_METRICS
from adaplex.server.metrics import Metrics, RpcMetrics
from adaplex.server.status import TABLE
from tools.docs import protocol, settings
from tools.docs.__main__ import ROOT, main
from tools.docs.documents import DOCUMENTS, outdated, write


def test_the_committed_documents_are_up_to_date() -> None:
    assert outdated(ROOT) == [], "run make docs"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_differs_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    assert main(["--check"], tmp_path) == 0
    path = tmp_path / name
    path.write_text(path.read_text() + "by hand\n")
    assert main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err == f"{name} is out of date: run make docs\n"
    path.unlink()
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert outdated(tmp_path) == []


def test_the_documents_do_not_depend_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {name: document() for name, document in DOCUMENTS.items()}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("ADAPLEX_PORT", "1")
    assert {name: document() for name, document in DOCUMENTS.items()} == here
    assert os.environ["XDG_DATA_HOME"] == str(tmp_path / "data")
    assert "`~/.local/share/adaplex/store`" in here["server/SETTINGS.md"]


def test_every_setting_is_in_a_section_with_its_names() -> None:
    assert settings.SECTIONS.keys() <= ServerConfig.model_fields.keys()
    text = settings.document()
    for heading, names in settings.by_section().items():
        assert f"\n## {heading}\n" in text
        for name in names:
            assert f"`ADAPLEX_{name.upper()}`" in text
    assert "| `auto`, integer, at least 1 | `auto` | Compute threads" in text
    assert "| integer, 0 to 65,535 | `50051` |" in text


def test_a_setting_without_a_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerConfig.model_fields["port"], "description", None)
    with pytest.raises(AssertionError):
        settings.document()


def test_every_exposed_metric_is_in_the_table() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, model_name="m")
    metrics.watch(EngineStats, max_lora=1)
    RpcMetrics(registry)
    store = {"adapters_stored", "adapter_stored_bytes", "adapter_store_capacity_bytes"}
    exposed = {family.name.removeprefix("adaplex_") for family in registry.collect()}
    assert exposed | store == {*METRICS, *RPC_METRICS}
    for spec in (*METRICS.values(), *RPC_METRICS.values()):
        assert set(spec.labels) <= LABELS.keys()
        assert spec.help.endswith(".")


def test_every_error_is_in_its_document() -> None:
    text = DOCUMENTS["server/ERRORS.md"]()
    for kind, mapping in TABLE.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{mapping.reason}` |"))
        assert mapping.cause in row
        assert mapping.remedy in row
        assert f"`{kind.__name__}`" in row
        assert mapping.code.name in row


def test_the_protocol_is_documented_with_its_comments() -> None:
    text = protocol.document()
    assert "| `UploadAdapter` | stream [UploadAdapterRequest](#uploadadapterrequest) |" in text
    assert "| `labels` | map of string to string | 2 |" in text
    assert "| `temperature` | optional float | 1 |" in text
    assert "| `token_ids` | [TokenIds](#tokenids) | 2 | One of `prompt`." in text
    assert "| `create_time` | google.protobuf.Timestamp | 9 |" in text
    for row in text.splitlines():
        assert not row.endswith("|  |"), f"without a comment: {row}"
