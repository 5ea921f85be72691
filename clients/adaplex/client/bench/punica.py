"""Punica's workload: streams that ask back to back, over popularities of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from adaplex.client.bench.load import Load
from adaplex.client.bench.roofline import StepBytes
from adaplex.client.bench.session import Case, Run, Session
from adaplex.client.bench.workload import MIXES, assigned


@dataclass(frozen=True)
class Punica:
    """Lengths in tokens; `requests` of each stream."""

    streams: tuple[int, ...] = (1, 8, 16, 32)
    mixes: tuple[str, ...] = MIXES
    prompt: int = 64
    output: int = 64
    requests: int = 2


async def punica(session: Session, plan: Punica) -> list[Run]:
    """One run for each number of streams and each mix."""
    most = [i for mix in plan.mixes for i in assigned(mix, max(plan.streams)) if i is not None]
    members = session.adapters.first(max(most, default=-1) + 1)
    await session.warm([None, *(member.name for member in members)])
    return [
        await _run(session, plan, streams, mix) for streams in plan.streams for mix in plan.mixes
    ]


async def _run(session: Session, plan: Punica, streams: int, mix: str) -> Run:
    chosen = assigned(mix, streams)
    members = session.adapters.members

    async def drive(load: Load) -> None:
        await load.closed(
            islice(
                session.prompts.asks(
                    None if index is None else members[index].name, plan.prompt, plan.output
                ),
                plan.requests,
            )
            for index in chosen
        )

    step = StepBytes.of(
        session.info.model,
        (members[index].packed_bytes for index in {*chosen} if index is not None),
        rows=streams,
        context=plan.prompt + plan.output / 2,
    )
    case: Case = {"streams": streams, "mix": mix}
    return await session.observe("punica", case, drive, total=streams * plan.requests, step=step)
