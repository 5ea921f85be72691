"""The server as its own process: the command line, kill -9, and a drained stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adaplex.client import AdaplexClientError, Client, NotFound, Unavailable
from adaplex.client.local import LocalServer, LogRecord
from adapters.handmade import staged
from time_limits import WAIT_SECONDS

ADAPLEX = [str(Path(sys.executable).with_name("adaplex"))]


class ProcessRig(LocalServer):
    """A server process of the tiny model; `events` are the events that it has logged."""

    def __init__(self, model: Path, store: Path) -> None:
        self.events: list[str] = []
        self._logged = threading.Condition()
        super().__init__(
            on_log=self._record,
            model=model,
            quantization="fp32",
            store_dir=store,
            threads=1,
            shutdown_timeout=WAIT_SECONDS,
        )

    def client(self) -> Client:
        """A client, once the server is SERVING."""
        self.wait_ready(WAIT_SECONDS)
        return Client(self.target, timeout=WAIT_SECONDS)

    def wait_logged(self, event: str) -> None:
        """Waits until the server has logged the event."""
        with self._logged:
            found = self._logged.wait_for(lambda: event in self.events, WAIT_SECONDS)
        assert found, f"{event!r} is not among {self.events}"

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs an `adaplex` command against the server."""
        return subprocess.run(
            [*ADAPLEX, "--target", self.target, *args],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )

    def _record(self, record: LogRecord) -> None:
        with self._logged:
            self.events.append(str(record["event"]))
            self._logged.notify_all()


@pytest.fixture
def starting(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Any:
    """`with starting() as process` starts a server on the test's one store and kills it at the
    end.
    """

    @contextmanager
    def start() -> Iterator[ProcessRig]:
        process = ProcessRig(tiny_model("llama"), tmp_path / "store")
        try:
            yield process
        finally:
            process.kill()

    return start


@pytest.mark.slow
def test_the_command_line_manages_adapters_and_generates(
    starting: Any, adapters: list[Path]
) -> None:
    with starting() as process:
        process.client().close()
        pushed = process.cli("adapters", "push", "first", str(adapters[0]))
        assert pushed.returncode == 0, pushed.stderr
        listed = process.cli("adapters", "ls", "--json")
        assert [row["name"] for row in json.loads(listed.stdout)] == ["first"]
        answered = process.cli(
            "generate", "--adapter", "first", "--max-tokens", "5", "--json", "hello"
        )
        answer = json.loads(answered.stdout)
        assert answer["adapter"]["name"] == "first"
        assert answer["usage"]["completion_tokens"] <= 5
        streamed = process.cli("generate", "--adapter", "first", "--max-tokens", "5", "hello")
        assert answer["text"].strip() in streamed.stdout
        assert "first@1" in streamed.stderr
        verified = process.cli("adapters", "verify", str(adapters[1]))
        assert verified.returncode == 0
        assert "q_proj" in verified.stdout
        shown = process.cli("adapters", "show", "first")
        assert "sha256:" in shown.stdout
        status = process.cli("status", "--json")
        assert json.loads(status.stdout)["capacity"]["adapters_stored"] == 1
        unknown = process.cli("generate", "--adapter", "nobody", "hello")
        assert unknown.returncode == 1
        assert "nobody" in unknown.stderr
        with process.client() as client, pytest.raises(NotFound):
            client.generate("hello", adapter="nobody")
        removed = process.cli("adapters", "rm", "first")
        assert removed.returncode == 0, removed.stderr
        assert json.loads(process.cli("adapters", "ls", "--json").stdout) == []


@pytest.mark.slow
def test_kill_9_during_uploads_loses_no_acknowledged_upload(
    starting: Any, adapters: list[Path], tmp_path: Path
) -> None:
    acknowledged: dict[str, str] = {}
    answers: dict[str, tuple[int, ...]] = {}
    for round_ in range(3):
        with starting() as process:
            client = process.client()
            for name, digest in acknowledged.items():
                got = client.generate("prompt", adapter=name, max_tokens=4, ignore_eos=True)
                assert got.adapter is not None
                assert got.adapter.digest == digest
                assert answers.setdefault(digest, tuple(got.token_ids)) == tuple(got.token_ids)
            assert {a.name for a in client.adapters.list()} >= acknowledged.keys()

            uploaded = threading.Semaphore(0)

            def upload(
                client: Client = client,
                round_: int = round_,
                uploaded: threading.Semaphore = uploaded,
            ) -> None:
                try:
                    for turn in range(1000):
                        name = f"r{round_}-{turn}"
                        done = client.adapters.upload(name, adapters[turn % len(adapters)])
                        acknowledged[name] = done.adapter.digest
                        uploaded.release()
                except AdaplexClientError:
                    return  # the server is gone

            uploading = threading.Thread(target=upload)
            uploading.start()
            for _ in range(5):
                assert uploaded.acquire(timeout=WAIT_SECONDS)
            process.kill()
            uploading.join(WAIT_SECONDS)
            assert not uploading.is_alive()
    with starting() as process:
        client = process.client()
        assert {a.name for a in client.adapters.list()} >= acknowledged.keys()
        assert staged(tmp_path / "store") == []
        for name, digest in list(acknowledged.items())[-20:]:
            got = client.generate("prompt", adapter=name, max_tokens=4, ignore_eos=True)
            assert got.adapter is not None
            assert got.adapter.digest == digest


def test_sigterm_finishes_running_streams_and_refuses_new_requests(starting: Any) -> None:
    with starting() as process:
        client = process.client()
        with client.stream("hello", max_tokens=400, ignore_eos=True) as stream:
            next(iter(stream))
            process.process.send_signal(signal.SIGTERM)
            process.wait_logged("draining")
            with pytest.raises(Unavailable):
                client.generate("more", max_tokens=1)
            for _ in stream:
                pass
        assert stream.generation.usage.completion_tokens == 400
        assert process.process.wait(WAIT_SECONDS) == 0
