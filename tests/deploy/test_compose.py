"""compose.yaml is consistent with the image, the server's settings and the other files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaplex.server.config import ServerConfig
from adaplex.server.load_config import load_config
from deploy.conftest import DEPLOY

Json = dict[str, Any]


def filled_in(value: str) -> str:
    """Replaces ${NAME:-default} in a value by the default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.fixture
def settings(compose: Json) -> dict[str, str]:
    environment = compose["services"]["server"]["environment"]
    return {name: filled_in(value) for name, value in environment.items()}


@pytest.fixture
def config(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """The server's configuration in the container's environment."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return load_config({})


def test_every_setting_of_the_server_exists(settings: dict[str, str]) -> None:
    assert settings.keys() <= {f"ADAPLEX_{name.upper()}" for name in ServerConfig.model_fields}


def test_settings_that_may_be_given_are_passed_on_under_their_name(compose: Json) -> None:
    for name, value in compose["services"]["server"]["environment"].items():
        if "$" in value:
            assert re.fullmatch(rf"\$\{{{name}:-[^}}]*\}}", value), name


def test_unset_settings_keep_their_defaults(config: ServerConfig) -> None:
    fields = ServerConfig.model_fields
    for name in ("model", "quantization", "arena_bytes", "kv_cache_bytes", "shutdown_timeout"):
        assert getattr(config, name) == fields[name].default


def test_server_listens_where_its_ports_are_published(compose: Json, config: ServerConfig) -> None:
    assert config.host == config.http_host == "0.0.0.0"
    published = [port.rsplit(":", 1)[1] for port in compose["services"]["server"]["ports"]]
    assert published == [str(config.port), str(config.http_port)]


def test_store_cache_and_roots_are_on_volumes(compose: Json, config: ServerConfig) -> None:
    mounts = [Path("/adapters")]
    for volume in compose["services"]["server"]["volumes"]:
        if isinstance(volume, str):
            name, target = volume.split(":")
            assert name in compose["volumes"]
            mounts.append(Path(target))
    assert config.cache is not None
    for folder in (config.store_dir, config.cache, *config.adapter_roots):
        assert any(folder.is_relative_to(mount) for mount in mounts), folder


def test_stop_waits_longer_than_the_drain(compose: Json, config: ServerConfig) -> None:
    assert seconds(compose["services"]["server"]["stop_grace_period"]) > config.shutdown_timeout


def test_every_port_is_bound_to_loopback_once(compose: Json) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len(set(ports)) == len(ports)


def test_every_image_is_pinned(compose: Json) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name


def test_services_start_when_the_one_before_is_healthy(compose: Json) -> None:
    waits = {name: service.get("depends_on", {}) for name, service in compose["services"].items()}
    assert waits == {
        "server": {},
        "prometheus": {"server": {"condition": "service_healthy"}},
        "grafana": {"prometheus": {"condition": "service_healthy"}},
    }
    for waited in ("prometheus",):  # the server's check is in its image
        assert compose["services"][waited]["healthcheck"]["test"]


def test_mounted_files_are_in_the_repository(compose: Json) -> None:
    build = compose["services"]["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_dir(), source


def test_the_network_file_publishes_only_with_tls_and_tokens() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
    text = (DEPLOY / "compose.network.yaml").read_text()
    server = yaml.load(text, Loader)["services"]["server"]
    given = server["environment"]
    assert given.keys() <= {f"ADAPLEX_{name.upper()}" for name in ServerConfig.model_fields}
    assert given["ADAPLEX_INSECURE"] == "false"
    (secrets,) = server["volumes"]
    for name in ("TLS_CERT", "TLS_KEY", "TOKENS_FILE"):
        assert Path(given[f"ADAPLEX_{name}"]).parent == Path(secrets["target"])
    assert server["ports"] == ["50051:50051", "9400:9400"]


def test_server_runs_with_the_least_rights(compose: Json) -> None:
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert "privileged" not in server
