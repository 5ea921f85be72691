"""A server that cannot start ends with a line for each reason, before torch is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaplex.model.kernels.native import instruction_sets
from adaplex.server import preflight
from adaplex.server.access.principal import Scope
from adaplex.server.access.token_file import TokenFile
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from server.certificates import Authority
from time_limits import WAIT_SECONDS


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of loopback on which a socket listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


def problems(tmp_path: Path, **settings: object) -> list[str]:
    """Returns the lines of an error; none if the settings are accepted."""
    free = {"port": 0, "http_port": 0, "store_dir": tmp_path / "store"}
    try:
        preflight.check(ServerConfig(**{**free, **settings}))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_settings_that_can_be_served_change_nothing(tmp_path: Path) -> None:
    assert problems(tmp_path, cache=tmp_path / "a" / "b") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["port", "http_port"])
def test_a_port_in_use(name: str, taken: int, tmp_path: Path) -> None:
    flag = name.replace("_", "-")
    assert problems(tmp_path, **{name: taken}) == [
        f"{name}: 127.0.0.1:{taken} is in use; end what listens there, or set --{flag} "
        "(0 picks a free port)"
    ]


def test_one_port_for_both(tmp_path: Path) -> None:
    [line] = problems(tmp_path, port=50051, http_port=50051)[-1:]
    assert line == "http_port: 50051 is the port of gRPC too; choose another, or 0 for any"


@pytest.mark.parametrize("name", ["host", "http_host"])
def test_an_address_of_another_machine(name: str, tmp_path: Path) -> None:
    [line] = problems(tmp_path, **{name: "192.0.2.1"}, insecure=True)
    assert line.startswith(f"{name}: cannot bind 192.0.2.1: ")
    [line] = problems(tmp_path, **{name: "256.0.0.1"})
    assert line.startswith(f"{name}: 256.0.0.1 is no address: ")


@pytest.mark.parametrize("name", ["host", "http_host"])
def test_an_address_beyond_loopback_needs_tls_and_tokens(name: str, tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("server")
    tls = {"tls_cert": pair.cert, "tls_key": pair.key}
    file = TokenFile(tmp_path / "tokens.json")
    file.create("ci", tenant="t", scopes=frozenset([Scope.ADMIN]))
    tokens = {"tokens_file": file.path}
    for lacking, given in (
        ("--tls-cert and --tokens-file", {}),
        ("--tokens-file", tls),
        ("--tls-cert", tokens),
    ):
        [line] = problems(tmp_path, **{name: "0.0.0.0"}, **given)
        assert line.startswith(f"{name}: 0.0.0.0 is not loopback, where others can call")
        assert f"set {lacking}, or --insecure" in line
    assert problems(tmp_path, **{name: "0.0.0.0"}, **tls, **tokens) == []
    assert problems(tmp_path, **{name: "0.0.0.0"}, insecure=True) == []
    assert problems(tmp_path, **{name: "localhost"}) == []


def test_files_of_certificates_and_tokens_are_read(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    lines = problems(tmp_path, tls_cert=gone, tls_key=gone, tokens_file=gone)
    assert [line.split(":")[0] for line in lines] == ["tls_cert", "tls_key", "tokens_file"]


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    settings = {"model": str(gone), "adapters": {"a": gone}, "signature_keys": [gone]}
    assert problems(tmp_path, **settings) == [
        f"model '{gone}': no such directory or .gguf file, and not a hub id",
        f"signature_keys: no such file: {gone}",
        f"adapters: a={gone}: no such directory or .gguf file",
    ]


@pytest.mark.parametrize("name", ["store_dir", "cache"])
def test_a_file_where_a_folder_should_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert problems(tmp_path, **{name: tmp_path / "file" / "below"}) == [
        f"{name}: {tmp_path / 'file'} is a file, not a folder; set --{name.replace('_', '-')}"
    ]


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert problems(tmp_path) == [
        f"store_dir: {tmp_path} cannot be written by this user; change its permissions or set "
        "--store-dir"
    ]


def serve(*flags: str) -> tuple[int, str]:
    """Runs `adaplex serve`; returns its exit code and stderr, with the heavy modules imported."""
    program = (
        "import sys; from adaplex.client.cli.plugins import command_app;"
        "from adaplex.server.cli.serve import serve\n"
        f"try: command_app(serve)({list(flags)!r})\n"
        "finally: print([m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert ran.stdout == "[]\n"
    return ran.returncode, ran.stderr


def test_serve_ends_before_it_imports_torch(taken: int, tmp_path: Path) -> None:
    code, stderr = serve("--port", str(taken), "--http-port", "0", "--model", "nowhere")
    lines = stderr.splitlines()
    assert code == 2
    assert [line.split(":")[1].split()[0] for line in lines] == ["port", "model"]
    assert all(line.startswith("adaplex serve: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("port: [", "not a YAML mapping of settings: while parsing"),
        ("[1]", "the file is a list, not a mapping"),
        ("port: high", "port: Input should be a valid integer"),
    ],
)
def test_serve_names_what_is_wrong_with_its_file(
    text: str | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    code, stderr = serve("--config", str(file))
    assert code == 2
    assert stderr.count("\n") == 1
    assert reason in stderr


def test_an_instruction_set_that_the_processor_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, "avx1024")
    [line] = problems(tmp_path)
    assert line.startswith("ADAPLEX_INSTRUCTION_SET is 'avx1024'; this processor can run: ")
    monkeypatch.setenv(instruction_sets.VARIABLE, "portable")
    assert problems(tmp_path) == []
