"""The cost of changing adapters: among those in the arena, and from host memory into the arena.

    make bench-switch                                 # the default model in nf4

Switch: sequential requests with another adapter each, compared with requests of one adapter, in
turns; a step of both decodes one row. Load: the copy of an adapter from host memory into the arena,
compared with a plain copy of as many bytes, in turns.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch

from adaplex.model import huge_pages
from bench.engine import Bench, add_common, open_bench, write_json


@dataclass(frozen=True)
class Switch:
    """Median milliseconds of a request: with the same adapter as the last one, and with another."""

    one_adapter: float
    next_adapter: float
    noise: float
    """Milliseconds between the 25th and 75th percentile of `one_adapter`."""

    def __str__(self) -> str:
        return (
            f"a request with the adapter of the last one {self.one_adapter:.2f} ms, with another "
            f"{self.next_adapter:.2f} ms ({self.next_adapter - self.one_adapter:+.2f}; "
            f"half of the former lie within {self.noise:.2f})"
        )


@dataclass(frozen=True)
class HostLoad:
    """Median milliseconds of a load of `nbytes` bytes and of a plain copy of as many."""

    nbytes: int
    host_to_arena: float
    plain_copy: float

    def __str__(self) -> str:
        return (
            f"host to arena {self.host_to_arena:.2f} ms for {self.nbytes / 1e6:.1f} MB, a plain "
            f"copy {self.plain_copy:.2f} ms: {self.host_to_arena / self.plain_copy:.2f} times"
        )


def switch(bench: Bench, repeats: int) -> Switch:
    """Measures short requests in turns."""
    same, other = [], []
    for number in range(repeats * len(bench.refs)):
        for adapter, times in ((0, same), (0, same), (number % len(bench.refs), other)):
            steps = bench.steps([bench.request(adapter, 16, 8)])
            times.append(1e3 * sum(seconds for seconds, _ in steps))
    ordered = sorted(same[1::2])  # the first of each pair follows another adapter
    noise = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    return Switch(median(ordered), median(other), noise)


def load_from_host(bench: Bench, repeats: int) -> HostLoad:
    """Measures loads of adapters of one size; the engine cannot be used afterwards."""
    runner, refs = bench.engine._runner, bench.refs
    size = refs[0].packed_bytes
    for ref in refs:
        runner.pack_adapter(bench.parts.registry.programs.program(ref.digest))
    sources = [torch.ones(size, dtype=torch.uint8) for _ in refs]
    room = huge_pages.empty(len(refs), size, dtype=torch.uint8).zero_()
    loaded, copied = [], []
    for _ in range(repeats):
        for place, ref in enumerate(refs):
            started = time.perf_counter()
            runner.copy_adapter(ref.digest, place * size, size)
            loaded.append(1e3 * (time.perf_counter() - started))
            started = time.perf_counter()
            room[place].copy_(sources[place])
            copied.append(1e3 * (time.perf_counter() - started))
    return HostLoad(size, median(loaded), median(copied))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=6)
    add_common(parser)
    options = parser.parse_args()
    with open_bench(options, options.adapters) as bench:
        switched = switch(bench, options.repeats)
        print(switched, flush=True)
        loaded = load_from_host(bench, options.repeats)
        print(loaded)
    write_json(options, switch=[switched], bring=[loaded])


if __name__ == "__main__":
    main()
