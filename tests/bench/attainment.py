"""Attainment: the share of first tokens within a bound, on S-LoRA's trace over 100 adapters.

    make bench-attainment
    make bench-attainment ARGS="--seconds 120 --share 0.8 --out attainment.json"

Measures the peak first, on the same server, with `--peak-requests` requests at once. Then runs the
trace at a share of that rate, over popularities (alpha) and burstiness (cv) of the arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path

from adaplex.client.bench.session import BenchRun, Session
from adaplex.client.bench.slora import SLoraPlan, run_slora
from adaplex.client.bench.workload import Trace
from adaplex.client.cli.bench import print_report
from bench.serving import ARENA, measured

AT_ONCE = 1000.0
"""Requests a second of the peak: all are sent before the first ends."""


async def sweep(session: Session, options: argparse.Namespace) -> list[BenchRun]:
    """Measures the peak, then every case at a share of it."""
    length = (options.shortest, options.longest)
    flood = Trace(alpha=0.5, rate=AT_ONCE, inputs=length, outputs=length)
    flood = replace(flood, seconds=options.peak_requests / AT_ONCE)
    runs = await run_slora(session, SLoraPlan(flood))
    peak = runs[0].measure.requests_per_second
    session.progress.print_line(f"peak: {peak:.2f} requests a second")
    cases = [(alpha, cv) for cv in options.cv for alpha in options.alpha]
    cases += [(options.alpha[-1], cv) for cv in options.bursts]
    for alpha, cv in cases:
        trace = replace(
            flood, alpha=alpha, cv=cv, rate=options.share * peak, seconds=options.seconds
        )
        runs += await run_slora(session, SLoraPlan(trace))
    return runs


async def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    report = await measured(options, ARENA, options.adapters, sweep)
    print_report(report)
    for run in report.runs:
        first = run.measure.first_token
        print(
            f"alpha {run.case['alpha']}, cv {run.case['cv']}, {run.case['rate']:.2f} requests/s: "
            f"attainment {run.measure.attainment:.3f}, P99 first token "
            f"{first.p99 if first else float('nan'):.0f} ms"
        )
    if options.out:
        options.out.write_text(report.json())


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.7, help="of the peak")
    parser.add_argument("--alpha", type=numbers, default=(0.1, 0.3, 0.6, 1.0))
    parser.add_argument("--cv", type=numbers, default=(1.0, 2.0))
    parser.add_argument(
        "--bursts", type=numbers, default=(4.0, 6.0, 8.0), help="more cv, for the last alpha"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of a case")
    parser.add_argument("--peak-requests", type=int, default=100)
    parser.add_argument("--shortest", type=int, default=8, help="tokens of prompts and answers")
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser.parse_args()


def numbers(text: str) -> tuple[float, ...]:
    """Parses `1,2,4` into numbers."""
    return tuple(map(float, text.split(",")))


if __name__ == "__main__":
    asyncio.run(main())
