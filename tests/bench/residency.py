"""Residency: the cost of using more adapters than fit into the arena.

    make bench-residency
    make bench-residency ARGS="--adapters 2000 --requests 400 --streams 8"

Uploads adapters of ranks 8 to 64 to a server of a tiny random model and runs the cliff workload:
working sets of 0.5 to 4 times the arena, uniform and zipf. Then runs one working set on a server
with few and on one with all adapters, in turn. Writes residency.json and residency.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adaplex.client import AsyncClient
from adaplex.client.bench.cliff import CliffPlan, run_cliff, run_working_set
from adaplex.client.bench.plot import draw
from adaplex.client.bench.progress import ProgressReporter
from adaplex.client.bench.report import Report, round_floats
from adaplex.client.bench.session import BenchConfig, BenchRun, Session, open_session
from adaplex.client.cli.bench import print_report
from adaplex.client.local import LocalServer
from tiny import save_tiny

HERE = Path(__file__).parent
RANKS = (8, 16, 32, 64)
FEW = 5
"""Adapters of the server with few adapters."""


async def session_of(stack: AsyncExitStack, server: LocalServer, adapters: int) -> Session:
    """Opens a session with `adapters` random adapters, which stay on the server."""
    await asyncio.to_thread(server.wait_ready)
    config = BenchConfig(
        target=server.target,
        make_adapters=adapters,
        ranks=RANKS,
        keep_adapters=True,
        metrics=f"http://127.0.0.1:{server.http_port}/metrics",
        pid=server.process.pid,
    )
    client = await stack.enter_async_context(AsyncClient(server.target))
    return await stack.enter_async_context(open_session(client, config, ProgressReporter()))


async def run(small: LocalServer, large: LocalServer, options: argparse.Namespace) -> None:
    """Uploads the adapters, measures both servers and writes the results."""
    plan = CliffPlan(
        streams=options.streams,
        requests=options.requests,
        prompt=options.prompt,
        output=options.output,
    )
    async with AsyncExitStack() as stack:
        few = await session_of(stack, small, FEW)
        started = time.perf_counter()
        all_ = await session_of(stack, large, options.adapters)
        seconds = time.perf_counter() - started
        curve = await run_cliff(all_, plan)
        pairs = []
        for _ in range(options.repeats):
            one = await run_working_set(few, plan, few.pool.adapters, "uniform")
            other = await run_working_set(all_, plan, all_.pool.adapters[:FEW], "uniform")
            pairs.append((one, other))
        given = {name: str(value) for name, value in vars(options).items() if name != "out"}
        report = Report.of(all_, given, curve)
    print_report(report)
    cliffs = {mix: over_half(curve, mix, 2) for mix in plan.mixes}
    kept = statistics.median(
        other.measure.requests_per_second / one.measure.requests_per_second for one, other in pairs
    )
    print(f"{options.adapters} adapters registered in {seconds:.0f} s")
    print(f"median first token at 2 times the arena / at 0.5 times: {cliffs}")
    print(f"throughput with {options.adapters} registered / with {FEW}: {kept:.3f}")
    found = json.loads(report.json()) | {
        "few_and_all": [[asdict(run) for run in pair] for pair in pairs],
        "median_at_2_over_median_at_half": cliffs,
        "throughput_all_over_few": round(kept, 3),
        "registration_seconds": round(seconds, 1),
    }
    options.out.mkdir(exist_ok=True, parents=True)
    (options.out / "residency.json").write_text(json.dumps(round_floats(found), indent=1) + "\n")
    draw(curve, options.out / "residency.svg")


def over_half(curve: Sequence[BenchRun], mix: str, place: int) -> float:
    """Returns a mix's median first token at one working set over that at the smallest."""
    firsts = [run.measure.first_token for run in curve if run.case["mix"] == mix]
    assert firsts[place]
    assert firsts[0]
    return round(firsts[place].p50 / firsts[0].p50, 2)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--arena", type=int, default=24 << 20, help="bytes")
    parser.add_argument("--requests", type=int, default=400, help="requests of each measurement")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--output", type=int, default=16, help="tokens")
    parser.add_argument(
        "--repeats", type=int, default=3, help="comparisons of few and all adapters"
    )
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
            asyncio.run(run(small, large, options))


if __name__ == "__main__":
    main()
