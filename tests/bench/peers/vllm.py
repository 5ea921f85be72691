"""vLLM: its OpenAI-compatible server on its CPU build.

Settings and reasons:
- bf16, the CPU's own format; `--max-num-seqs` and `--max-loras` allow an adapter for every stream,
  `--max-lora-rank` is the adapters' rank: nothing is swapped or padded.
- All adapters are loaded at start by `--lora-modules`.
- No prefix cache, since prompts are never repeated; `--max-model-len` fits the longest stream.
- Compute threads are bound to one core each (`VLLM_CPU_OMP_THREADS_BIND`), none reserved; tcmalloc
  and Intel's OpenMP are preloaded, both as vLLM's documentation for CPUs recommends.
- Compiled, its default; `--enforce-eager` would only start sooner.
- Started as a module, since this build's `vllm` command looks for a package of another name.
- Greedy, `ignore_eos`, prompts as token ids, streamed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Self

from adaplex.client.local import free_port

from . import install
from .events import post
from .server_process import ProcessSystem
from .system import ReportProgress, StreamResult

KV_CACHE_GIB = 2
MODEL = "base"


class Vllm(ProcessSystem):
    """`vllm serve` on the CPU."""

    name = "vllm"

    def prepare(self, progress: ReportProgress) -> None:
        """Installs vLLM. Raises PeerError."""
        self._python = install.vllm(progress)
        self._preloaded = install.vllm_libraries(progress)

    async def __aenter__(self) -> Self:
        inputs, port = self._inputs, free_port()
        count = str(len(inputs.adapters))
        command = [
            *(self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", inputs.model),
            *("--served-model-name", MODEL),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-num-seqs", str(inputs.slots), "--max-model-len", str(inputs.context)),
            *("--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(inputs.rank)),
            *("--max-loras", count, "--max-cpu-loras", count, "--lora-modules"),
            *(f"a{i}={directory}" for i, directory in enumerate(inputs.adapters)),
        ]
        cores = sorted(os.sched_getaffinity(0))[: inputs.threads]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "LD_PRELOAD": ":".join(map(str, self._preloaded)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        await self._start(command, port, variables)
        return self

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        """Sends one request to /v1/completions."""
        body = {
            "model": MODEL if adapter is None else f"a{adapter}",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, first, text, count = time.perf_counter(), 0.0, "", 0
        async for event in post(self._server.port, "/v1/completions", body):
            first = first or time.perf_counter() - started
            text += "".join(choice["text"] for choice in event["choices"])
            count = (event.get("usage") or {}).get("completion_tokens", count)
        return StreamResult(text, count, first, time.perf_counter() - started)
