"""Tokens a second through gRPC: base, one adapter, and an adapter of its own for every stream.

    make bench                       # the default model in nf4
    .venv/bin/python tests/bench/throughput.py --streams 1 8 16 --rank 16

Starts a server on free loopback ports, uploads random adapters on all linears, and prints a table
and a JSON line. All modes run in one process lifetime, so that ratios between them hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adaplex.client import AsyncClient
from adaplex.client.local import LocalServer
from adaplex.model.source import resolve_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_adapter(model: Path, directory: Path, rank: int, seed: int) -> Path:
    """Writes a LoRA of the rank on all linears of the model, small and random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    tensors = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            out_features, in_features = module.weight.shape
            for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                weight = torch.randn(shape, generator=generator) * 0.02
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = weight.bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": TARGETS,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


async def measure(client: AsyncClient, adapters: list[str | None], tokens: int) -> float:
    """Output tokens a second of one stream an entry, prompts of `tokens` unique tokens."""

    async def stream(adapter: str | None) -> int:
        prompt = [random.randrange(1000, 40000) for _ in range(tokens)]
        answer = await client.generate(
            prompt, adapter=adapter, max_tokens=tokens, ignore_eos=True, timeout=600
        )
        return answer.usage.completion_tokens

    begun = time.perf_counter()
    done = await asyncio.gather(*map(stream, adapters))
    return sum(done) / (time.perf_counter() - begun)


async def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="prompt and output tokens")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    model = resolve_model(options.model)
    count = max(options.streams)
    with (
        tempfile.TemporaryDirectory() as work,
        LocalServer(model=options.model, store_dir=f"{work}/store") as server,
    ):
        await asyncio.to_thread(server.wait_ready)
        async with AsyncClient(server.target) as client:
            for i in range(count):
                directory = random_adapter(model, Path(work) / f"a{i}", options.rank, i)
                await client.adapters.upload(f"a{i}", directory)
                await client.generate([1, 2, 3], adapter=f"a{i}", max_tokens=2)
            figures = {}
            print(f"{'streams':>8}{'base':>10}{'one':>10}{'distinct':>10}  tok/s")
            for streams in options.streams:
                mixes: dict[str, list[str | None]] = {
                    "base": [None] * streams,
                    "one": ["a0"] * streams,
                    "distinct": [f"a{i}" for i in range(streams)],
                }
                row = {
                    name: await measure(client, mix, options.tokens) for name, mix in mixes.items()
                }
                figures[streams] = {name: round(value, 1) for name, value in row.items()}
                print(f"{streams:>8}" + "".join(f"{v:>10.0f}" for v in row.values()), flush=True)
    print(json.dumps({"model": options.model, "rank": options.rank, "tok_per_s": figures}))


if __name__ == "__main__":
    asyncio.run(main())
