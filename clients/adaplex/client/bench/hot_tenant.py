"""One hot tenant: the cost of a flood of requests for one adapter to the tenants of others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.session import BenchRun, Session
from adaplex.client.bench.workload import Trace


@dataclass(frozen=True)
class HotTenantPlan:
    """`tenants` cold tenants with an adapter each send `rate` requests a second in all; the hot one
    has `flood` streams. `prompt` and `output` are in tokens.
    """

    tenants: int = 4
    rate: float = 2.0
    flood: int = 16
    prompt: int = 64
    output: int = 32
    seconds: float = 20.0


async def run_hot_tenant(session: Session, plan: HotTenantPlan) -> list[BenchRun]:
    """Measures the cold tenants without the flood, and with it."""
    adapters = session.pool.first(plan.tenants + 1)
    await session.warm_up(adapter.name for adapter in adapters)
    hot, *cold = (adapter.name for adapter in adapters)
    return [await _run(session, plan, cold, None), await _run(session, plan, cold, hot)]


async def _run(session: Session, plan: HotTenantPlan, cold: list[str], hot: str | None) -> BenchRun:
    trace = Trace(
        rate=plan.rate,
        seconds=plan.seconds,
        inputs=(plan.prompt, plan.prompt + 1),
        outputs=(plan.output, plan.output + 1),
    )
    requests = trace.requests(cold, session.prompts, session.config.seed)

    async def drive(load: LoadGenerator) -> Mapping[str, Any]:
        if hot is None:
            await load.run_open(requests)
            return {}
        flood = LoadGenerator(session.send)
        streams = [session.prompts.requests(hot, plan.prompt, plan.output)] * plan.flood
        flooding = asyncio.create_task(flood.run_closed(streams))
        await load.run_open(requests)
        flooding.cancel()
        with suppress(asyncio.CancelledError):
            await flooding
        return {"hot": asdict(session.measure(flood.results))} if flood.results else {}

    case = {"flood": plan.flood if hot else 0, "tenants": plan.tenants}
    return await session.observe("hot-tenant", case, drive, total=len(requests))
