"""One hot tenant: what a flood of requests for one adapter costs those who ask for others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from adaplex.client.bench.load import Load
from adaplex.client.bench.session import Run, Session
from adaplex.client.bench.workload import Trace


@dataclass(frozen=True)
class HotTenant:
    """`rate` is that of all cold tenants together, `flood` the streams of the hot one."""

    tenants: int = 4
    rate: float = 2.0
    flood: int = 16
    prompt: int = 64
    output: int = 32
    seconds: float = 20.0


async def hot_tenant(session: Session, plan: HotTenant) -> list[Run]:
    """The cold tenants without the flood, and with it."""
    members = session.adapters.first(plan.tenants + 1)
    await session.warm(member.name for member in members)
    hot, *cold = (member.name for member in members)
    return [await _run(session, plan, cold, None), await _run(session, plan, cold, hot)]


async def _run(session: Session, plan: HotTenant, cold: list[str], hot: str | None) -> Run:
    trace = Trace(
        rate=plan.rate,
        seconds=plan.seconds,
        inputs=(plan.prompt, plan.prompt + 1),
        outputs=(plan.output, plan.output + 1),
    )
    asks = trace.asks(cold, session.prompts, session.setup.seed)

    async def drive(load: Load) -> Mapping[str, Any]:
        if hot is None:
            await load.open(asks)
            return {}
        flood = Load(session.target)
        streams = [session.prompts.asks(hot, plan.prompt, plan.output)] * plan.flood
        flooding = asyncio.create_task(flood.closed(streams))
        await load.open(asks)
        flooding.cancel()
        with suppress(asyncio.CancelledError):
            await flooding
        return {"hot": asdict(session.measure(flood.answers))} if flood.answers else {}

    case = {"flood": plan.flood if hot else 0, "tenants": plan.tenants}
    return await session.observe("hot-tenant", case, drive, total=len(asks))
