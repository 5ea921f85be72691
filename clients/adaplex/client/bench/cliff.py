"""The residency cliff: working sets of adapters smaller and larger than the device's arena."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from adaplex.client.bench.fleet import Member
from adaplex.client.bench.load import Load
from adaplex.client.bench.session import Case, Run, Session
from adaplex.client.bench.workload import chooser


@dataclass(frozen=True)
class Cliff:
    """`times` are working sets in arenas; `requests` of all streams together."""

    times: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    mixes: tuple[str, ...] = ("uniform", "zipf")
    streams: int = 8
    requests: int = 200
    prompt: int = 16
    output: int = 16


async def cliff(session: Session, plan: Cliff) -> list[Run]:
    """One run for each mix and each working set."""
    arena = session.info.capacity.arena_bytes_total
    sets = [session.adapters.working_set(times * arena) for times in plan.times]
    return [
        await ask_working_set(session, plan, members, mix) for mix in plan.mixes for members in sets
    ]


async def ask_working_set(
    session: Session, plan: Cliff, members: tuple[Member, ...], mix: str
) -> Run:
    """One run over these adapters, which are all brought into host memory before."""
    await session.warm(member.name for member in members)
    draw = chooser(mix, len(members), random.Random(session.setup.seed))

    async def drive(load: Load) -> Mapping[str, int]:
        asks = (
            next(session.prompts.asks(members[draw()].name, plan.prompt, plan.output))
            for _ in range(plan.requests)
        )
        await load.closed([asks] * plan.streams)
        return {"arena_bytes": arena}

    nbytes = sum(member.packed_bytes for member in members)
    arena = session.info.capacity.arena_bytes_total
    case: Case = {"mix": mix, "arenas": round(nbytes / arena, 2), "adapters": len(members)}
    return await session.observe("cliff", case, drive, total=plan.requests)
