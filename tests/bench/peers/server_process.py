"""ServerProcess: a peer's server as a child, from its start to the end of all it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.request import urlopen

from .system import PeerError

START_SECONDS = 600.0
"""vLLM compiles its kernels for the model at its first start."""
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.2
END_WITH_US = ("setpriv", "--pdeathsig", "TERM")
"""Even a benchmark that is killed leaves no server behind."""


class ServerProcess:
    """Runs `command`, which listens on `port` of loopback; what it prints goes to the file `log`.

    It leads a process group of its own, so that stopping it stops its workers too.
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
        # PYTHONPATH may name our own sources, which are none of the peer's business.
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*END_WITH_US, *(str(part) for part in command)],
                env={**kept, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def wait_ready(self, path: str = "/health") -> None:
        """Returns once GET `path` gives 200; what does not come to that is stopped. PeerError with
        its last words if it ends before.
        """
        try:
            await self._look(path)
        except BaseException:
            self.stop()
            raise

    async def _look(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await asyncio.to_thread(self._answers, path):
            if (code := self._process.poll()) is not None:
                raise PeerError(f"the server ended with code {code} at its start: {self._words()}")
            if time.monotonic() > deadline:
                raise PeerError(f"not ready after {START_SECONDS:.0f} s: {self._words()}")
            await asyncio.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """Asks the whole group to end, and ends what is left of it."""
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

    def _words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it: {self.log})"
