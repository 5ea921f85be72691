"""Residency: what it costs when more adapters are asked for than the arena holds.

    make bench-residency
    .venv/bin/python tests/bench/residency.py --adapters 2000 --requests 400 --streams 8

Registers adapters of ranks 8 to 64 on a tiny random model, then asks for a working set of 0.5 to 4
times the arena, uniformly and by zipf, and for the same working set with few and with all adapters
registered. Streams run back to back; every prompt is new. Prints a table, writes residency.json and
residency.svg beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from adaplex.client import AsyncClient, Client, Delta
from adaplex.client.local import LocalServer
from tiny import save_tiny

HERE = Path(__file__).parent
RANKS = (8, 16, 32, 64)
LAYERS = 3
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}
"""[in, out] of every linear of tests/tiny.py's llama."""
ZIPF = 1.5
FEW = 5
"""Adapters of the small registry that the large one is compared with."""


@dataclass(frozen=True)
class Point:
    """One measurement. Times in milliseconds."""

    registered: int
    working_set: int
    times_arena: float
    mix: str
    requests_per_second: float
    first_token_median: float
    first_token_p99: float
    loads: int
    """Copies into the arena while it was measured."""


def write_adapter(directory: Path, rank: int, seed: int) -> Path:
    """A random LoRA on every linear."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=dice) * 0.1
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=dice) * 0.1
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rpartition(".")[2] for name in SHAPES],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def register(client: Client, work: Path, numbers: range) -> list[int]:
    """Uploads adapters a<number>; the packed bytes of each."""
    sizes = []
    for number in numbers:
        directory = write_adapter(work / "adapter", RANKS[number % len(RANKS)], number)
        sizes.append(client.adapters.upload(f"a{number}", directory).adapter.packed_bytes)
    return sizes


def chooser(mix: str, count: int, dice: random.Random) -> Callable[[], int]:
    """Draws adapters of a working set: all alike, or few of them often."""
    if mix == "uniform":
        return lambda: dice.randrange(count)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(count)]
    order = dice.sample(range(count), count)
    return lambda: order[dice.choices(range(count), weights)[0]]


async def ask(client: AsyncClient, adapter: str, tokens: list[int], length: int) -> float:
    """Seconds to the first token of one answer, which is read to its end."""
    begun, first = time.perf_counter(), 0.0
    async with client.stream(
        tokens, adapter=adapter, max_tokens=length, ignore_eos=True, timeout=120
    ) as events:
        async for event in events:
            if isinstance(event, Delta) and not first:
                first = time.perf_counter() - begun
    return first


async def measure(
    client: AsyncClient, working_set: int, mix: str, options: argparse.Namespace
) -> tuple[float, list[float]]:
    """Requests a second, and the first-token times, of streams that ask back to back."""
    dice = random.Random(42)
    draw = chooser(mix, working_set, dice)
    left = iter(range(options.requests))
    times: list[float] = []

    async def stream() -> None:
        for _ in left:
            prompt = [dice.randrange(3, 259) for _ in range(options.prompt)]
            times.append(await ask(client, f"a{draw()}", prompt, options.output))

    begun = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(options.streams)))
    return options.requests / (time.perf_counter() - begun), times


def loads(client: Client, http_port: int) -> int:
    """How many adapters were brought into the arena so far, by the server's metrics."""
    from urllib.request import urlopen

    text = urlopen(f"http://127.0.0.1:{http_port}/metrics").read().decode()
    counts = (
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("adaplex_adapter_loads_total") and 'tier="arena"' in line
    )
    return int(sum(counts))


def point(
    server: LocalServer,
    client: Client,
    registered: int,
    sizes: list[int],
    times_arena: float,
    mix: str,
    options: argparse.Namespace,
) -> Point:
    """Measures one working set."""
    total, working_set = 0, 0
    while working_set < len(sizes) and (
        total + sizes[working_set] <= times_arena * options.arena or not working_set
    ):
        total += sizes[working_set]
        working_set += 1
    for number in range(working_set):  # into host memory, once
        client.generate([3, 4, 5], adapter=f"a{number}", max_tokens=1)
    before = loads(client, server.http_port)

    async def run() -> tuple[float, list[float]]:
        async with AsyncClient(server.target) as asking:
            return await measure(asking, working_set, mix, options)

    rate, times = asyncio.run(run())
    ordered = sorted(times)
    return Point(
        registered=registered,
        working_set=working_set,
        times_arena=round(total / options.arena, 2),
        mix=mix,
        requests_per_second=round(rate, 1),
        first_token_median=round(statistics.median(ordered) * 1e3, 2),
        first_token_p99=round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
        loads=loads(client, server.http_port) - before,
    )


def draw_picture(points: list[Point], path: Path) -> None:
    """First-token times and throughput over the working set."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for mix in ("uniform", "zipf"):
        chosen = [p for p in points if p.mix == mix]
        x = [p.times_arena for p in chosen]
        left.plot(x, [p.first_token_median for p in chosen], marker="o", label=f"{mix}, median")
        left.plot(x, [p.first_token_p99 for p in chosen], "--", marker=".", label=f"{mix}, P99")
        right.plot(x, [p.requests_per_second for p in chosen], marker="o", label=mix)
    left.set(title="first token", xlabel="working set / arena", ylabel="ms", ylim=(0, None))
    right.set(title="throughput", xlabel="working set / arena", ylabel="requests/s", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def show(found: Point) -> None:
    """One line of the table."""
    print(
        f"{found.registered:>10}{found.working_set:>8}{found.times_arena:>8}{found.mix:>9}"
        f"{found.requests_per_second:>9}{found.first_token_median:>9}{found.first_token_p99:>9}"
        f"{found.loads:>8}",
        flush=True,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--arena", type=int, default=24 << 20, help="bytes")
    parser.add_argument("--requests", type=int, default=400, help="of each measurement")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--output", type=int, default=16, help="tokens")
    parser.add_argument("--repeats", type=int, default=3, help="of few against all, in turn")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings: dict[str, object] = {
            "model": save_tiny("llama", work / "tiny"),
            "quantization": "fp32",
            "threads": 1,
            "arena_bytes": options.arena,
            "host_bytes": 2 << 30,
            "log_level": "warning",
        }
        with (
            LocalServer(store_dir=work / "few", **settings) as small,
            LocalServer(store_dir=work / "all", **settings) as large,
        ):
            small.wait_ready()
            large.wait_ready()
            with Client(small.target) as few, Client(large.target) as all_:
                report = run(small, few, large, all_, work, options)
    curve = [Point(**found) for found in report["curve"]]  # type: ignore[attr-defined]
    options.out.mkdir(exist_ok=True, parents=True)
    (options.out / "residency.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_picture(curve, options.out / "residency.svg")


def run(
    small: LocalServer,
    few: Client,
    large: LocalServer,
    all_: Client,
    work: Path,
    options: argparse.Namespace,
) -> dict[str, object]:
    """Registers, measures, compares."""
    begun = time.perf_counter()
    sizes = register(all_, work, range(options.adapters))
    seconds = time.perf_counter() - begun
    print(f"{options.adapters} adapters of {sum(sizes) >> 20} MiB registered in {seconds:.0f} s")
    few_sizes = register(few, work, range(FEW))
    print(
        f"{'registered':>10}{'asked':>8}{'/arena':>8}{'mix':>9}{'req/s':>9}{'median':>9}{'P99':>9}"
        f"{'loads':>8}   first token in ms"
    )
    curve = []
    for mix in ("uniform", "zipf"):
        for times_arena in (0.5, 1, 2, 4):
            curve.append(point(large, all_, options.adapters, sizes, times_arena, mix, options))
            show(curve[-1])
    pairs = []
    for _ in range(options.repeats):
        one = point(small, few, FEW, few_sizes, 1, "uniform", options)
        other = point(large, all_, options.adapters, sizes[:FEW], 1, "uniform", options)
        show(one)
        show(other)
        pairs.append((one, other))
    cliffs = {
        mix: round(chosen[2].first_token_median / chosen[0].first_token_median, 2)
        for mix in ("uniform", "zipf")
        if (chosen := [p for p in curve if p.mix == mix])
    }
    kept = statistics.median(b.requests_per_second / a.requests_per_second for a, b in pairs)
    print(f"median first token at 2 times the arena / at 0.5 times: {cliffs}")
    print(f"throughput with {options.adapters} registered / with {FEW}: {kept:.3f}")
    return {
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "curve": [asdict(found) for found in curve],
        "few_and_all": [[asdict(found) for found in pair] for pair in pairs],
        "median_at_2_over_median_at_half": cliffs,
        "throughput_all_over_few": round(kept, 3),
        "registration_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
