"""ServerProcess, ProcessSystem: a peer's server as a child process, with its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.request import urlopen

from .system import Inputs, PeerError

START_SECONDS = 600.0
"""Limit of a start; vLLM compiles its kernels for the model at its first."""
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")
"""Terminates the server even if the benchmark is killed."""


class ServerProcess:
    """Runs `command`, which listens on loopback's `port`; its output goes to the file `log`.

    It leads a process group of its own, so that `stop` also stops its workers.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        port: int,
        log: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.log = port, log
        # PYTHONPATH may name this project's sources, which a peer must not import.
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*DIE_WITH_PARENT, *(str(part) for part in command)],
                env={**kept, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def wait_ready(self, path: str = "/health") -> None:
        """Waits until GET `path` responds with 200.

        Otherwise stops the server and raises PeerError with the last line of its log.
        """
        try:
            await self._poll(path)
        except BaseException:
            self.stop()
            raise

    async def _poll(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await asyncio.to_thread(self._answers, path):
            if (code := self._process.poll()) is not None:
                raise PeerError(f"the server ended with code {code} at its start: {self._last()}")
            if time.monotonic() > deadline:
                raise PeerError(f"not ready after {START_SECONDS:.0f} s: {self._last()}")
            await asyncio.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Terminates the process group, and kills what is left of it after STOP_SECONDS."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)  # workers that outlived their parent
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _answers(self, path: str) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening yet, or 503 while it loads
            return False

    def _last(self) -> str:
        """Returns the last line of the log, and the log's path."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'the log is empty'} (log: {self.log})"


class ProcessSystem:
    """A system whose server is a child process with its log in the inputs' folder."""

    name: str

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    async def __aexit__(self, *_: object) -> None:
        self._server.stop()

    async def _start(
        self, command: Sequence[object], port: int, variables: Mapping[str, str] | None = None
    ) -> None:
        """Starts the server, which listens on `port`, and waits until it is ready."""
        log = self._inputs.logs / f"{self.name}.log"
        self._server = ServerProcess(command, port=port, log=log, variables=variables)
        await self._server.wait_ready()
