"""HF PEFT: `generate` with `adapter_names`, behind peft_server.py, since PEFT has no server.

Settings and reasons:
- bf16 on torch's CPU build, as many torch threads as cores, and scaled-dot-product attention, the
  fastest of transformers' attentions on a CPU.
- Requests that arrive together become one batch of different adapters, by `adapter_names`. The
  batch is static: its rows begin and end together, which costs nothing here, since all streams of a
  cell are equally long. It does not stream: its first token arrives with its last.
- A batch of one adapter, or of the base alone, uses PEFT's faster `set_adapter` or
  `disable_adapter`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from adaplex.client.local import free_port

from . import install
from .events import post
from .server_process import ProcessSystem
from .system import ReportProgress, StreamResult

SERVER = Path(__file__).with_name("peft_server.py")


class Peft(ProcessSystem):
    """PEFT in its own environment."""

    name = "peft"

    def prepare(self, progress: ReportProgress) -> None:
        """Installs PEFT. Raises PeerError."""
        self._python = install.peft(progress)

    async def __aenter__(self) -> Self:
        inputs, port = self._inputs, free_port()
        # -P: the script's folder has a vllm.py and a peft.py, which would shadow the packages.
        command: list[object] = [
            *(self._python, "-P", SERVER, "--port", str(port), "--model", inputs.model),
            *("--threads", str(inputs.threads), "--slots", str(inputs.slots)),
            *("--adapters", *inputs.adapters),
        ]
        await self._start(command, port, {"HF_HUB_OFFLINE": "1"})
        return self

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        """Sends one request to peft_server.py."""
        body = {"prompt": list(prompt), "adapter": adapter, "tokens": tokens}
        started, output = time.perf_counter(), []
        async for event in post(self._server.port, "/generate", body):
            output = event["output"]
        total = time.perf_counter() - started
        return StreamResult(str(output), len(output), total, total)
