"""The gain of activations of 8 bits on a CPU: pairs of steps in float and in int8, in one process.

    make bench-activations
    ADAPLEX_INSTRUCTION_SET=avx2 make bench-activations ARGS="--quantization int4-group"

CPU seconds of one thread, so that other work on the machine changes little; the order within a pair
changes from pair to pair, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from adaplex.client.bench.workload import adapter_indices
from adaplex.model.kernels.native.instruction_sets import chosen_set
from adaplex.server.build import build
from adaplex.server.load_config import load_config
from bench.engine import ARENA, MIXES, Bench, add_common, counts

ACTIVATIONS = ("float", "int8")


def open_engine(options: argparse.Namespace, activations: str, folder: Path) -> Bench:
    """Opens an engine of one thread with adapters in its arena."""
    settings = {
        "model": options.model,
        "quantization": options.quantization,
        "cpu_activations": activations,
        "device": "cpu",
        "threads": 1,
        "max_stretch": "inf",
        "store_dir": folder / "store",
        "adapter_roots": str(folder),
        "arena_bytes": ARENA,
    }
    parts = build(load_config(settings), lambda _: None)
    bench = Bench(parts, folder, max(options.rows), options.rank)
    bench.warm_up()
    return bench


def cpu_steps(bench: Bench, adapters: list[int | None], prompt: int, output: int) -> list[float]:
    """Runs requests to their ends; returns CPU seconds of the steps in which each had a token."""
    for adapter in adapters:
        bench.engine.add(bench.request(adapter, prompt, output))
    found = []
    while bench.engine.has_work:
        begun = time.process_time()
        _, outputs = bench.step()
        if sum(len(each.tokens) for each in outputs) == len(adapters):
            found.append(time.process_time() - begun)
    return found


def print_pairs(name: str, rounds: int, seconds: Callable[[str], float]) -> None:
    """Prints the median ratio of pairs, with the seconds of the fastest of each kind."""
    pairs = []
    for number in range(rounds):
        order = ACTIVATIONS if number % 2 else ACTIVATIONS[::-1]
        found = {kind: seconds(kind) for kind in order}
        pairs.append([found[kind] for kind in ACTIVATIONS])
    ratio = statistics.median(exact / rounded for exact, rounded in pairs)
    exact, rounded = (1e3 * min(each) for each in zip(*pairs, strict=True))
    print(f"{name}: float {exact:.1f} ms, int8 {rounded:.1f} ms, {ratio:.2f} times", flush=True)


def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    print(f"{options.quantization}, {chosen_set().name}, CPU time of one thread")
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for kind in ACTIVATIONS:
            (Path(folder) / kind).mkdir()
            engines[kind] = open_engine(options, kind, Path(folder) / kind)
        gc.freeze()

        def prefill(kind: str, mix: str) -> float:
            adapters = adapter_indices(MIXES[mix], 1)
            return cpu_steps(engines[kind], adapters, options.long, 1)[0]

        def decode(kind: str, mix: str, rows: int) -> float:
            adapters = adapter_indices(MIXES[mix], rows)
            return statistics.median(
                cpu_steps(engines[kind], adapters, options.prompt, options.output)[1:]
            )

        for mix in ("base", "one"):
            name = f"prefill of {options.long} tokens, {mix}"
            print_pairs(name, options.rounds, lambda kind, mix=mix: prefill(kind, mix))
        for rows in options.rows:
            for mix in ("base", "distinct"):
                print_pairs(
                    f"step of {rows} rows, {mix}",
                    options.rounds,
                    lambda kind, mix=mix, rows=rows: decode(kind, mix, rows),
                )
        for bench in engines.values():
            bench.engine.check_integrity()
            bench.engine.close()
            bench.parts.registry.close()


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=counts, default=[1, 8, 16])
    parser.add_argument("--long", type=int, default=256, help="tokens of the prefilled prompt")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each measurement")
    add_common(parser)
    parser.set_defaults(output=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
