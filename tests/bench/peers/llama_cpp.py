"""llama.cpp: its own server, built for this CPU, on files of its own converters.

Settings and reasons:
- `--threads` is the number of cores, also for batches; `--parallel` is one slot a stream, with
  `--ctx-size` for the longest stream in every slot; continuous batching is the default.
- No prompt cache (`--no-cache-prompt`, `--cache-ram 0`): prompts are never repeated, so it would
  only cost time.
- All adapters are loaded at start (`--lora-init-without-apply`); a request names its adapter in
  `lora`, which sets all others to 0. A base request names one with scale 0, since an empty list
  means all of them. llama.cpp does not batch streams with different adapters.
- Greedy by `top_k` 1 as the only sampler, the cheapest chain; prompts are token ids.
- Run as three systems, bf16, q8_0 and q4_k_m, since each is faster in some cells; compare with the
  best. The quality of q4_k_m is nearest to that of nf4.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from adaplex.client.local import free_port

from . import install
from .events import post
from .inputs import model_files
from .server_process import ProcessSystem
from .system import Inputs, PeerError, ReportProgress, StreamResult


class LlamaCpp(ProcessSystem):
    """llama-server with a model of `file_type` "bf16", "q8_0" or "q4_k_m"."""

    def __init__(self, file_type: str, inputs: Inputs) -> None:
        self.name = f"llama.cpp-{file_type}"
        super().__init__(inputs)
        self._file_type = file_type
        self._folder = Path()
        self._model = Path()
        self._adapters: list[Path] = []

    def prepare(self, progress: ReportProgress) -> None:
        """Builds the server and converts model and adapters. Raises PeerError."""
        self._folder = install.llama_cpp(progress)
        model = self._inputs.model
        self._model = model_files(model) / f"{self._file_type}.gguf"
        self._make_model(model, progress)
        for adapter in self._inputs.adapters:
            file = adapter.with_name(f"{adapter.name}.gguf")
            given: list[Path | str] = ["--base", model, adapter]
            self._convert("convert_lora_to_gguf.py", given, file, "f16", progress)
            self._adapters.append(file)

    def _make_model(self, model: Path, progress: ReportProgress) -> None:
        """Makes the model's file: by the converter, or from that of bf16 by llama-quantize, which
        makes what the converter cannot. Raises PeerError.
        """
        if self._file_type != "q4_k_m":
            self._convert("convert_hf_to_gguf.py", [model], self._model, self._file_type, progress)
            return
        wide = self._model.with_name("bf16.gguf")
        self._convert("convert_hf_to_gguf.py", [model], wide, "bf16", progress)
        staging = self._staging(self._model)
        command = [self._folder / "build/bin/llama-quantize", wide, staging, "Q4_K_M"]
        self._write(self._model, command, progress)

    def _convert(
        self,
        script: str,
        given: Sequence[Path | str],
        file: Path,
        kind: str,
        progress: ReportProgress,
    ) -> None:
        """Runs one of llama.cpp's converters, unless `file` exists. Raises PeerError."""
        python, script_file = self._folder / "env/bin/python", self._folder / "source" / script
        staging = self._staging(file)
        command = [python, script_file, *given, "--outfile", staging, "--outtype", kind]
        self._write(file, command, progress)

    @staticmethod
    def _staging(file: Path) -> Path:
        """Returns where a command writes what becomes `file`."""
        return file.with_suffix(".partial")

    def _write(self, file: Path, command: Sequence[Path | str], progress: ReportProgress) -> None:
        """Runs a command that writes `_staging(file)`, unless `file` exists. Raises PeerError."""
        if file.is_file():
            return
        progress(f"{self.name}: converting into {file.name}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise PeerError(f"{file.name}: {last[0]}")
        self._staging(file).rename(file)

    async def __aenter__(self) -> Self:
        inputs = self._inputs
        port = free_port()
        command: list[object] = [
            *(self._folder / "build/bin/llama-server", "--model", self._model),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--threads", str(inputs.threads), "--threads-batch", str(inputs.threads)),
            *("--parallel", str(inputs.slots), "--ctx-size", str(inputs.slots * inputs.context)),
            *("--no-cache-prompt", "--cache-ram", "0", "--lora-init-without-apply"),
        ]
        if self._adapters:
            command += ["--lora", ",".join(map(str, self._adapters))]
        await self._start(command, port)
        return self

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        """Sends one request to /completion."""
        body = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "lora": [{"id": adapter or 0, "scale": 0.0 if adapter is None else 1.0}],
            "stream": True,
        }
        started, first, text, count = time.perf_counter(), 0.0, "", 0
        async for event in post(self._server.port, "/completion", body):
            first = first or time.perf_counter() - started
            text += event["content"]
            count = event.get("tokens_predicted", count)
        return StreamResult(text, count, first, time.perf_counter() - started)
