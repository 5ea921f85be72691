"""HF PEFT: `generate` with `adapter_names`, behind peft_server.py, as PEFT has no server itself.

How it is driven, and why:
- bf16 on torch's CPU build, torch's threads as many as cores, scaled-dot-product attention, the
  fastest of transformers' attentions on a CPU.
- Requests that arrive together become one batch, whatever their adapters: what `adapter_names` is
  for. The batch is static: its rows begin and end together, which costs nothing here, as all
  streams of a cell are equally long. It does not stream: its first token comes with its last.
- A batch of one adapter, and one of the base alone, take PEFT's own faster way: `set_adapter`, and
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
from .server_process import ServerProcess
from .system import Answer, Inputs, Progress

SERVER = Path(__file__).with_name("peft_server.py")


class Peft:
    """PEFT in an environment of its own."""

    name = "peft"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def prepare(self, progress: Progress) -> None:
        """Makes PEFT's environment."""
        self._python = install.peft(progress)

    async def __aenter__(self) -> Self:
        inputs, port = self._inputs, free_port()
        # -P: the folder of the script holds a vllm.py and a peft.py that are not the packages.
        command: list[object] = [
            *(self._python, "-P", SERVER, "--port", str(port), "--model", inputs.model),
            *("--threads", str(inputs.threads), "--slots", str(inputs.slots)),
            *("--adapters", *inputs.adapters),
        ]
        log = inputs.logs / f"{self.name}.log"
        variables = {"HF_HUB_OFFLINE": "1"}
        self._server = ServerProcess(command, port=port, log=log, variables=variables)
        await self._server.wait_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.stop()

    async def generate(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> Answer:
        """One request to our wrapper."""
        body = {"prompt": list(prompt), "adapter": adapter, "tokens": tokens}
        begun, output = time.perf_counter(), []
        async for event in post(self._server.port, "/generate", body):
            output = event["output"]
        total = time.perf_counter() - begun
        return Answer(str(output), len(output), total, total)
