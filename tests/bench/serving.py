"""Serving: every workload of `adaplex bench`, through gRPC, on new server processes.

    make bench                                   # the default model in nf4, a table
    make bench ARGS="--out tests/bench"          # serving.json and serving.svg too
    make bench ARGS="--only punica --streams 1,8,16 --quantization bf16"

All runs of a workload use one server process, so that ratios between them hold.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adaplex.client.bench.churn import ChurnPlan, run_churn
from adaplex.client.bench.cliff import CliffPlan, run_cliff
from adaplex.client.bench.hot_tenant import HotTenantPlan, run_hot_tenant
from adaplex.client.bench.plot import draw
from adaplex.client.bench.punica import PunicaPlan, run_punica
from adaplex.client.bench.report import Report
from adaplex.client.bench.session import BenchRun, Session
from adaplex.client.bench.slora import SLoraPlan, run_slora
from adaplex.client.bench.workload import Trace
from adaplex.client.cli.bench import print_report
from bench.engine import counts
from bench.families import FamiliesPlan, run_families
from bench.served import served

WORKLOADS = ("punica", "slora", "hot-tenant", "churn", "families", "cliff")
ARENA = 512 << 20
"""Bytes; room for an adapter of rank 16 for each of 32 streams."""
SMALL_ARENA = 48 << 20
"""Bytes of the cliff's arena, small so that four times as many are quickly uploaded."""
CLIFF_ADAPTERS = 24

Work = Callable[[Session, argparse.Namespace], Awaitable[Sequence[BenchRun]]]


async def measured(options: argparse.Namespace, arena: int, adapters: int, work: Work) -> Report:
    """Starts a server with an arena of `arena` bytes and `adapters` adapters, and reports the runs
    of `work` on it.
    """
    given = {name: value for name, value in vars(options).items() if name != "out"}
    async with served(options, arena=arena, adapters=adapters) as session:
        return Report.of(session, given, await work(session, options))


async def all_but_cliff(session: Session, options: argparse.Namespace) -> list[BenchRun]:
    """Runs the chosen workloads whose adapters all fit into the arena."""
    seconds, rank = options.seconds, options.rank
    short = Trace(alpha=0.5, rate=1.0, seconds=2 * seconds, inputs=(8, 128), outputs=(8, 64))
    runs: list[BenchRun] = []
    if "punica" in options.only:
        runs += await run_punica(session, PunicaPlan(streams=options.streams))
    if "slora" in options.only:
        runs += await run_slora(session, SLoraPlan(short))
    if "hot-tenant" in options.only:
        runs += await run_hot_tenant(session, HotTenantPlan(rate=1.0, flood=8, seconds=seconds))
    if "churn" in options.only:
        runs += await run_churn(session, ChurnPlan(rank=rank, seconds=seconds, pause=0.5))
    if "families" in options.only:
        runs += await run_families(session, FamiliesPlan(), options.model)
    return runs


async def cliff_alone(session: Session, options: argparse.Namespace) -> list[BenchRun]:
    """Runs the workload that needs a small arena."""
    return await run_cliff(session, CliffPlan(requests=48, streams=4))


async def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    reports = []
    if set(options.only) - {"cliff"}:
        adapters = max(*options.streams, HotTenantPlan.tenants + 1)
        reports.append(await measured(options, ARENA, adapters, all_but_cliff))
    if "cliff" in options.only:
        reports.append(await measured(options, SMALL_ARENA, CLIFF_ADAPTERS, cliff_alone))
    report = replace(
        reports[0],
        runs=[run for part in reports for run in part.runs],
        warnings=[warning for part in reports for warning in part.warnings],
    )
    print_report(report)
    if options.out:
        options.out.mkdir(exist_ok=True, parents=True)
        (options.out / "serving.json").write_text(report.json())
        draw(report.runs, options.out / "serving.svg")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(WORKLOADS))
    parser.add_argument("--streams", type=counts, default=(1, 8, 16, 32), help="1,8,16,32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="seconds of the timed workloads"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--out", type=Path, help="folder for serving.json and serving.svg")
    options = parser.parse_args()
    if unknown := set(options.only) - set(WORKLOADS):
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(WORKLOADS)}")
    return options


if __name__ == "__main__":
    asyncio.run(main())
