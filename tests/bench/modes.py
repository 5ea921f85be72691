"""Modes: output tokens a second in unmerged, merged and auto mode, of the engine on this machine.

    make bench-modes                 # the default model, as bf16 and as nf4
    make bench-modes ARGS="--streams 8 --tokens 64 --threads 1"

Streams send requests back to back with adapters of a mix; prompts are unique. A mode is measured
after a warm-up in which auto mode learns costs and merges adapters. Prints one row a base and mix;
ratios hold within a row.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import torch

from adaplex.client.bench.checkpoint import write_checkpoint
from adaplex.engine.auto_merge import MIN_STEPS, STRIDE
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SamplingParams
from adaplex.model.base.loader import BaseModel, load_base
from adaplex.model.runner import ModelRunner
from rig import Programs, lowered

BLOCKS = 1024
MIXES = ("identical", "zipf", "distinct")


class Traffic:
    """An engine with a constant number of streams: a new request replaces each one that ends."""

    def __init__(
        self,
        base: BaseModel,
        programs: Programs,
        choose: Callable[[int], str],
        mode: AdapterMode,
        options: argparse.Namespace,
    ) -> None:
        self._programs, self._choose = programs, choose
        self._mode, self._tokens = mode, options.tokens
        self._base, self._numbers, self._random = base, count(), random.Random(0)
        runner = ModelRunner.for_base(
            base,
            num_blocks=BLOCKS,
            block_tokens=16,
            arena_bytes=256 << 20,
        )
        config = EngineConfig(
            num_blocks=BLOCKS,
            arena_bytes=256 << 20,
            merged_bytes=len(programs) * (256 << 20),
            max_model_len=1024,
            prefix_cache=False,
        )
        self.engine = Engine(config, runner, programs, base_digest="base")
        for _ in range(options.streams):
            self._add_request()

    def run(self, *, seconds: float = 0.0, steps: int = 0) -> float:
        """Runs at least `seconds` seconds and `steps` steps with rows; returns tokens a second."""
        started, tokens = time.perf_counter(), 0
        while steps > 0 or time.perf_counter() - started < seconds:
            outputs = self.engine.step()
            if self.engine.stalled:
                time.sleep(0.01)  # leaves the processor to the loader
            else:
                steps -= 1
            for output in outputs:
                if output.error is not None:
                    raise output.error
                tokens += len(output.tokens)
                if output.last:
                    self._add_request()
        return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        """Closes the engine, which waits for its loader."""
        self.engine.close()

    def _add_request(self) -> None:
        number = next(self._numbers)
        program = self._programs[self._choose(number)]
        size = program.packed_bytes(self._base.dtype.itemsize)
        adapter = AdapterRef("a", 1, program.digest, size, program.traits, self._mode)
        prompt = tuple(self._random.randrange(1000, 40000) for _ in range(self._tokens))
        length = self._random.randint(self._tokens // 2, self._tokens * 3 // 2)
        sampling = SamplingParams(max_tokens=length)
        self.engine.add(Request(f"r{number}", prompt, sampling, adapter, arrival=float(number)))


def chooser(mix: str, digests: list[str]) -> Callable[[int], str]:
    """Returns a function from the number of a request to the digest of its adapter."""
    chance = random.Random(1)
    weights = [1 / rank**1.5 for rank in range(1, len(digests) + 1)]
    return {
        "identical": lambda _: digests[0],
        "zipf": lambda _: chance.choices(digests, weights)[0],
        "distinct": lambda number: digests[number % len(digests)],
    }[mix]


def compare(
    base: BaseModel, programs: Programs, mix: str, options: argparse.Namespace
) -> dict[str, float]:
    """Returns tokens a second of each mode, and the ratio of auto to the better of the others:
    medians over rounds in which the modes take turns, so that noise affects all of them.
    """
    engines = {
        mode.value: Traffic(base, programs, chooser(mix, list(programs)), mode, options)
        for mode in AdapterMode
    }
    for traffic in engines.values():
        traffic.run(steps=2 * STRIDE * MIN_STEPS)
    rounds = [
        {mode: traffic.run(seconds=options.seconds) for mode, traffic in engines.items()}
        for _ in range(options.rounds)
    ]
    for traffic in engines.values():
        traffic.close()
    row = {mode: round(median(figures[mode] for figures in rounds), 1) for mode in engines}
    better = max(("unmerged", "merged"), key=lambda mode: row[mode])
    row["auto / better"] = round(median(f["auto"] / f[better] for f in rounds), 3)
    row["copies"] = len(engines["auto"].engine.stats().merged)
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantizations", nargs="+", default=["bf16", "nf4"])
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=MIXES)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, default=64, help="of a prompt, and of the mean output"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of a turn of a mode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, dict[str, float]] = {}
    print(f"{'base':>6} {'mix':<10}" + "".join(f"{mode:>10}" for mode in AdapterMode), end="")
    print(" tok/s, auto / better, copies that auto made")
    with tempfile.TemporaryDirectory() as work:
        for quantization in options.quantizations:
            base = load_base(options.model, quantization=quantization)
            if base.kernels is not None:
                base.kernels.use_threads(options.threads)
            modules = tuple(base.spec.modules.values())
            folders = [
                write_checkpoint(Path(work) / f"{quantization}{i}", modules, options.rank, i)
                for i in range(options.streams)
            ]
            lowered_all = (lowered(folder, base.spec) for folder in folders)
            programs = Programs((program.digest, program) for program in lowered_all)
            for mix in options.mixes:
                row = compare(base, programs, mix, options)
                figures[f"{quantization} {mix}"] = row
                print(f"{quantization:>6} {mix:<10}" + "".join(f"{v:>10}" for v in row.values()))
    print(json.dumps({"model": options.model, "rank": options.rank, "tok_per_s": figures}))


if __name__ == "__main__":
    main()
