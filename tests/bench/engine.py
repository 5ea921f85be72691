"""The engine's speed without gRPC, tokenizer and event loop.

    make bench-engine                            # the default model in nf4
    make bench-engine ARGS="--rows 1,16 --quantization bf16 --json engine.json"
    make bench-engine ARGS="--temperature 1 --top-p 0.95"

Builds the server's components in this process and calls `Engine.step()`: decode steps of full
batches over no, one and distinct adapters, and the prefill of one long prompt.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from adaplex.adapters.storage.event import Origin
from adaplex.client.bench.checkpoint import write_checkpoint
from adaplex.client.bench.machine import Machine, read_bandwidth
from adaplex.client.bench.report import round_floats
from adaplex.client.bench.roofline import Roofline, StepBytes
from adaplex.client.bench.workload import adapter_indices
from adaplex.engine.engine import Engine
from adaplex.engine.request import (
    AdapterRef,
    Request,
    SamplingParams,
    StepOutput,
)
from adaplex.server.build import build
from adaplex.server.components import Components
from adaplex.server.load_config import load_config

MIXES = {"base": "base", "one": "identical", "distinct": "distinct"}
ARENA = 512 << 20
STALL_SECONDS = 0.001
"""Pause after a step without rows, while adapters are loaded."""


@dataclass(frozen=True)
class Decode:
    """Decode steps in which every row had a token. `step` (median) and `step_p90` are in
    milliseconds.
    """

    rows: int
    mix: str
    tokens_per_second: float
    step: float
    step_p90: float
    roofline: Roofline | None


@dataclass(frozen=True)
class Prefill:
    """Prompt tokens a second of one prompt up to its first token, the best of several runs."""

    mix: str
    tokens: int
    tokens_per_second: float


class Bench:
    """An engine, adapters for it, and requests whose prompts are never repeated."""

    def __init__(self, parts: Components, folder: Path, adapters: int, rank: int) -> None:
        self.parts = parts
        # Its thread is not started: the main thread runs the steps.
        self.engine: Engine = parts.engine._engine
        self.refs = [self._adapter(folder / f"a{i}", rank, seed=i) for i in range(adapters)]
        self.sampling = SamplingParams()
        """Sampling parameters of every request, except its length."""
        self._dice, self._ids = random.Random(42), count()

    def request(self, adapter: int | None, prompt: int, output: int) -> Request:
        """Returns a request for exactly `output` tokens."""
        return Request(
            request_id=str(next(self._ids)),
            prompt=tuple(self._dice.choices(range(self.parts.limits.vocab_size), k=prompt)),
            sampling=replace(self.sampling, max_tokens=output),
            adapter=None if adapter is None else self.refs[adapter],
            arrival=time.monotonic(),
        )

    def steps(self, requests: list[Request]) -> list[tuple[float, int]]:
        """Runs requests to their ends; returns seconds and number of tokens of each step."""
        for request in requests:
            self.engine.add(request)
        found = []
        while self.engine.has_work:
            seconds, outputs = self.step()
            found.append((seconds, sum(len(output.tokens) for output in outputs)))
        return found

    def step(self) -> tuple[float, list[StepOutput]]:
        """Runs one step; returns its seconds and its outputs. Raises the error of an output."""
        started = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - started
        for output in outputs:
            if output.error is not None:
                raise output.error
        if self.engine.stalled:
            time.sleep(STALL_SECONDS)
        return seconds, outputs

    def decode(self, rows: int, mix: str, options: argparse.Namespace, bandwidth: float) -> Decode:
        """Measures decode steps of `rows` rows; only steps in which all rows decode count."""
        chosen = adapter_indices(MIXES[mix], rows)
        steps = self.steps([self.request(i, options.prompt, options.output) for i in chosen])
        # The first step in which every row has a token completes the last prefill.
        every = [seconds for seconds, tokens in steps if tokens == rows][1:]
        step = StepBytes.of(
            self.parts.model,
            (self.refs[i].packed_bytes for i in {*chosen} if i is not None),
            rows=rows,
            context=options.prompt + options.output / 2,
        )
        median = 1e3 * statistics.median(every)
        return Decode(
            rows=rows,
            mix=mix,
            tokens_per_second=rows * len(every) / sum(every),
            step=median,
            step_p90=1e3 * sorted(every)[int(0.9 * len(every))],
            roofline=Roofline.of(step, bandwidth, median) if bandwidth else None,
        )

    def prefill(self, mix: str, tokens: int, repeats: int = 3) -> Prefill:
        """Measures the prefill of one prompt of `tokens` tokens."""
        adapter = None if mix == "base" else 0
        seconds = [
            sum(seconds for seconds, _ in self.steps([self.request(adapter, tokens, 1)]))
            for _ in range(repeats)
        ]
        return Prefill(mix, tokens, tokens / min(seconds))

    def warm_up(self) -> None:
        """Loads every adapter into the arena."""
        self.steps([self.request(i, 4, 1) for i in range(len(self.refs))])

    def _adapter(self, directory: Path, rank: int, seed: int) -> AdapterRef:
        write_checkpoint(directory, self.parts.model.modules, rank, seed)
        origin = Origin(datetime.now(UTC), actor="bench")
        self.parts.importer.load(str(directory), directory.name, replace=False, origin=origin)
        lease = self.parts.registry.resolve(directory.name)
        try:
            return AdapterRef.of(lease.record)
        finally:
            lease.release()


@contextmanager
def open_bench(options: argparse.Namespace, adapters: int) -> Iterator[Bench]:
    """Opens an engine with `adapters` random adapters in its arena, and closes it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = {
            "model": options.model,
            "quantization": options.quantization,
            "head": options.head,
            "threads": options.threads,
            "max_stretch": options.max_stretch,
            "store_dir": work / "store",
            "adapter_roots": str(work),
            "arena_bytes": ARENA,
        }
        parts = build(load_config(settings), lambda line: print(line, file=sys.stderr))
        bench = Bench(parts, work, adapters, options.rank)
        bench.warm_up()
        gc.freeze()  # as the server does before it serves
        yield bench
        bench.engine.check_integrity()
        bench.engine.close()
        parts.registry.close()


def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    with open_bench(options, max(options.rows)) as bench:
        bench.sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p)
        bandwidth = options.bandwidth * 1e9
        if not bandwidth and bench.parts.model.device == "cpu":
            bandwidth = read_bandwidth()
        decodes = [
            print_decode(bench.decode(rows, mix, options, bandwidth))
            for rows in options.rows
            for mix in MIXES
        ]
        prefills = [bench.prefill(mix, options.long) for mix in ("base", "one")]
        for prefill in prefills:
            speed = f"{prefill.tokens_per_second:.0f} tok/s"
            print(f"prefill of {prefill.tokens} tokens, {prefill.mix}: {speed}")
    write_json(options, bandwidth, decode=decodes, prefill=prefills)


def print_decode(found: Decode) -> Decode:
    """Prints a row of the table and returns its argument."""
    floor = f", {found.roofline.share:.0%} of the roofline" if found.roofline else ""
    print(
        f"{found.rows:>3} rows, {found.mix:<9}{found.tokens_per_second:>7.0f} tok/s"
        f"{found.step:>8.1f} ms a step (P90 {found.step_p90:.1f}){floor}",
        flush=True,
    )
    return found


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=counts, default=[1, 8, 16, 32])
    parser.add_argument("--long", type=int, default=1024, help="tokens of the prefilled prompt")
    parser.add_argument(
        "--bandwidth", type=float, default=0.0, help="GB/s of the device; measured on a CPU"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    add_common(parser)
    parser.set_defaults(max_stretch="inf")  # so that all rows soon decode at once
    return parser.parse_args()


def write_json(options: argparse.Namespace, bandwidth: float = 0.0, **found: Sequence[Any]) -> None:
    """Writes the results, by kind, to the file of `--json`, if one is given."""
    if not options.json:
        return
    report = {
        "machine": asdict(Machine.here(bandwidth or None)),
        "options": {name: str(value) for name, value in vars(options).items()},
        **{kind: [asdict(each) for each in cases] for kind, cases in found.items()},
    }
    options.json.write_text(json.dumps(round_floats(report), indent=1) + "\n")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every benchmark that opens an engine."""
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--head", default="bf16", help="as for adaplex serve")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--max-stretch", default="2", help="as for adaplex serve")
    parser.add_argument("--json", type=Path)


def counts(text: str) -> list[int]:
    """Parses `1,8,16` into numbers."""
    return [*map(int, text.split(","))]


if __name__ == "__main__":
    main()
