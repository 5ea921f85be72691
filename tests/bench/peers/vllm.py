"""vLLM: its OpenAI-compatible server on its CPU build.

How it is driven, and why:
- bf16, the CPU's own format; `--max-num-seqs` and `--max-loras` for every stream with an adapter of
  its own, `--max-lora-rank` that of the adapters: nothing is swapped, nothing padded.
- All adapters are loaded at start by `--lora-modules`.
- No prefix cache, as prompts are never repeated; `--max-model-len` what the longest stream needs.
- Compute threads bound to the cores one each (`VLLM_CPU_OMP_THREADS_BIND`), none reserved; tcmalloc
  and Intel's OpenMP preloaded, both as vLLM's documentation for CPUs asks.
- Compiled, its default; `--enforce-eager` only starts sooner.
- Started as a module, as this build's `vllm` command asks for a package by another name.
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
from .server_process import ServerProcess
from .system import Answer, Inputs, Progress

KV_CACHE_GIB = 2
MODEL = "base"


class Vllm:
    """`vllm serve` on the CPU."""

    name = "vllm"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def prepare(self, progress: Progress) -> None:
        """Makes vLLM's environment."""
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
        log = inputs.logs / f"{self.name}.log"
        self._server = ServerProcess(command, port=port, log=log, variables=variables)
        await self._server.wait_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.stop()

    async def generate(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> Answer:
        """One request to /v1/completions."""
        body = {
            "model": MODEL if adapter is None else f"a{adapter}",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begun, first, text, count = time.perf_counter(), 0.0, "", 0
        async for event in post(self._server.port, "/v1/completions", body):
            first = first or time.perf_counter() - begun
            text += "".join(choice["text"] for choice in event["choices"])
            count = (event.get("usage") or {}).get("completion_tokens", count)
        return Answer(text, count, first, time.perf_counter() - begun)
