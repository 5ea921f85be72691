"""The instructions of the Dockerfile, and the image's health check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from adaplex.server.config import ServerConfig
from adaplex.server.http import HttpServer
from adaplex.server.load_config import load_config
from adaplex.server.tls import Certificates, TlsFiles
from deploy.conftest import DEPLOY, ROOT
from server.certificates import Authority
from time_limits import WAIT_SECONDS

Check = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Pairs (keyword, rest) of the instructions: continuation lines joined, no comments."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    whole = re.sub(r"\\\n\s*", " ", text)
    return [
        (k, rest.strip())
        for k, _, rest in (line.partition(" ") for line in whole.split("\n") if line)
    ]


@pytest.fixture(scope="module")
def final(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The instructions of the last stage."""
    start = max(i for i, (keyword, _) in enumerate(instructions) if keyword == "FROM")
    return instructions[start:]


def values(instructions: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for found, rest in instructions if found == keyword]


def one(instructions: list[tuple[str, str]], keyword: str) -> str:
    (value,) = values(instructions, keyword)
    return value


def environment(instructions: list[tuple[str, str]]) -> dict[str, str]:
    pairs = " ".join(values(instructions, "ENV")).split()
    return dict(pair.split("=", 1) for pair in pairs)


def test_base_image_is_pinned(instructions: list[tuple[str, str]]) -> None:
    bases = {rest.split()[0] for rest in values(instructions, "FROM")}
    assert bases == {"${PYTHON}"}
    assert values(instructions, "ARG")[0] == "PYTHON=python:3.11-slim-bookworm"


def test_it_runs_as_a_fixed_unprivileged_user(final: list[tuple[str, str]]) -> None:
    assert one(final, "USER") == "10001:10001"
    keywords = [keyword for keyword, _ in final]
    assert "RUN" not in keywords[keywords.index("USER") :]
    assert "COPY" not in keywords[keywords.index("USER") :]


def test_requirements_are_pinned(instructions: list[tuple[str, str]]) -> None:
    set_up = environment(instructions)
    assert set_up["PIP_CONSTRAINT"] == "/src/constraints.txt"
    assert set_up["PIP_BUILD_CONSTRAINT"] == set_up["PIP_CONSTRAINT"]
    assert values(instructions, "WORKDIR")[0] == "/src"
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins if pin and not pin.startswith("#"))


def test_every_family_is_served(instructions: list[tuple[str, str]]) -> None:
    arguments = dict(rest.split("=", 1) for rest in values(instructions, "ARG"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    chosen = arguments["EXTRAS"].split(",")
    assert {"server", "peft"} <= set(chosen) <= known.keys()
    (install,) = (rest for rest in values(instructions, "RUN") if "bin/pip install" in rest)
    assert install.endswith('pip install ".[${EXTRAS}]"')


def test_the_image_has_its_kernels_compiled_and_no_compiler(
    instructions: list[tuple[str, str]], final: list[tuple[str, str]]
) -> None:
    first = instructions[: len(instructions) - len(final)]
    (install,) = (rest for rest in values(first, "RUN") if "apt-get install" in rest)
    packages = install.split("apt-get install", 1)[1].split("&&", 1)[0].split()
    assert {"gcc", "libc6-dev"} <= set(packages)
    (build,) = (rest for rest in values(first, "RUN") if "bin/pip install" in rest)
    assert 'ADAPLEX_WHEEL_PLATFORM="linux_$(uname -m)"' in build
    assert not any("gcc" in rest for _, rest in final)


def test_the_image_installs_only_what_it_needs(final: list[tuple[str, str]]) -> None:
    (install,) = (rest for rest in values(final, "RUN") if "apt-get install" in rest)
    assert "--no-install-recommends" in install
    assert install.endswith("&& rm -rf /var/lib/apt/lists/*")
    assert not any(re.search(r"build-essential|curl|wget", rest) for _, rest in final)


def test_ports_and_folders_are_those_of_the_settings(
    final: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {k: v for k, v in environment(final).items() if k.startswith("ADAPLEX_")}
    assert settings.keys() <= {f"ADAPLEX_{name.upper()}" for name in ServerConfig.model_fields}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    config = load_config({})

    assert one(final, "EXPOSE").split() == [str(config.port), str(config.http_port)]
    assert config.host == config.http_host == "0.0.0.0"
    volumes = [Path(folder) for folder in json.loads(one(final, "VOLUME"))]
    assert config.cache is not None
    for folder in (config.store_dir, config.cache):
        assert any(folder.is_relative_to(volume) for volume in volumes), folder


def test_image_and_compose_have_the_same_settings(
    final: list[tuple[str, str]], compose: dict[str, dict[str, dict[str, dict[str, str]]]]
) -> None:
    given = compose["services"]["server"]["environment"]
    for name, value in environment(final).items():
        if name in given:
            assert given[name] == value


def test_entry_point_is_the_server(final: list[tuple[str, str]]) -> None:
    assert json.loads(one(final, "ENTRYPOINT")) == ["adaplex", "serve"]
    assert one(final, "STOPSIGNAL") == "SIGTERM"


def test_everything_copied_is_in_the_build_context(instructions: list[tuple[str, str]]) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copied = [
        source
        for rest in values(instructions, "COPY")
        if "--from=" not in rest
        for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source


@pytest.fixture
def check(final: list[tuple[str, str]]) -> Check:
    """A function that runs the image's health check against a port."""
    command = json.loads(one(final, "HEALTHCHECK").split("CMD", 1)[1])
    assert command[0] == "python"
    assert Path(command[1]).name == "healthcheck.py"

    def run(port: str, **environment: str) -> subprocess.CompletedProcess[str]:
        proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        return subprocess.run(
            [sys.executable, DEPLOY / "healthcheck.py"],
            env={**os.environ, **proxy, "ADAPLEX_HTTP_PORT": port, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )

    return run


@pytest.mark.parametrize(("ready", "status"), [(True, 0), (False, 1)])
def test_health_check_follows_the_server(check: Check, ready: bool, status: int) -> None:
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), lambda: ready)
    try:
        assert check(str(server.port)).returncode == status
    finally:
        server.close()


def test_health_check_speaks_tls_where_the_server_does(check: Check, tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("server")
    certificates = Certificates(TlsFiles(pair.cert, pair.key, None))
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), lambda: True, certificates)
    try:
        assert check(str(server.port), ADAPLEX_TLS_CERT=str(pair.cert)).returncode == 0
        assert check(str(server.port)).returncode == 1
    finally:
        server.close()


def test_the_image_alone_is_refused_on_its_addresses(final: list[tuple[str, str]]) -> None:
    assert "ADAPLEX_INSECURE" not in environment(final), "whoever runs it decides that"


def test_health_check_fails_when_nothing_listens(check: Check) -> None:
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), lambda: True)
    server.close()
    done = check(str(server.port))
    assert done.returncode == 1
    assert "no answer" in done.stderr
