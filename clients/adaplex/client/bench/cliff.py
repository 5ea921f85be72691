"""The residency cliff: working sets of adapters smaller and larger than the device's arena."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from adaplex.client.bench.adapter_pool import BenchAdapter
from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.session import BenchRun, Case, Session
from adaplex.client.bench.workload import index_sampler


@dataclass(frozen=True)
class CliffPlan:
    """`times` are sizes of working sets in arenas, `requests` the number of one run, of all streams
    together; `prompt` and `output` are in tokens.
    """

    times: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    mixes: tuple[str, ...] = ("uniform", "zipf")
    streams: int = 8
    requests: int = 200
    prompt: int = 16
    output: int = 16


async def run_cliff(session: Session, plan: CliffPlan) -> list[BenchRun]:
    """Measures one run for each mix and working set."""
    arena = session.info.capacity.arena_bytes_total
    sets = [session.pool.working_set(times * arena) for times in plan.times]
    return [
        await run_working_set(session, plan, adapters, mix)
        for mix in plan.mixes
        for adapters in sets
    ]


async def run_working_set(
    session: Session, plan: CliffPlan, adapters: tuple[BenchAdapter, ...], mix: str
) -> BenchRun:
    """Measures one run over these adapters, which are all loaded into host memory before."""
    await session.warm_up(adapter.name for adapter in adapters)
    draw = index_sampler(mix, len(adapters), random.Random(session.config.seed))

    async def drive(load: LoadGenerator) -> Mapping[str, int]:
        requests = (
            next(session.prompts.requests(adapters[draw()].name, plan.prompt, plan.output))
            for _ in range(plan.requests)
        )
        await load.run_closed([requests] * plan.streams)
        return {"arena_bytes": arena}

    nbytes = sum(adapter.packed_bytes for adapter in adapters)
    arena = session.info.capacity.arena_bytes_total
    case: Case = {"mix": mix, "arenas": round(nbytes / arena, 2), "adapters": len(adapters)}
    return await session.observe("cliff", case, drive, total=plan.requests)
