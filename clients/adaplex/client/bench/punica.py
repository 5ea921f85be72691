"""Punica's workload: streams of back-to-back requests, over popularities of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.roofline import StepBytes
from adaplex.client.bench.session import BenchRun, Case, Session
from adaplex.client.bench.workload import MIXES, adapter_indices


@dataclass(frozen=True)
class PunicaPlan:
    """`prompt` and `output` are in tokens; each stream sends `requests` requests."""

    streams: tuple[int, ...] = (1, 8, 16, 32)
    mixes: tuple[str, ...] = MIXES
    prompt: int = 64
    output: int = 64
    requests: int = 2


async def run_punica(session: Session, plan: PunicaPlan) -> list[BenchRun]:
    """Measures one run for each number of streams and mix."""
    most = max(plan.streams)
    used = [i for mix in plan.mixes for i in adapter_indices(mix, most) if i is not None]
    adapters = session.pool.first(max(used, default=-1) + 1)
    await session.warm_up([None, *(adapter.name for adapter in adapters)])
    return [
        await _run(session, plan, streams, mix) for streams in plan.streams for mix in plan.mixes
    ]


async def _run(session: Session, plan: PunicaPlan, streams: int, mix: str) -> BenchRun:
    chosen = adapter_indices(mix, streams)
    adapters = session.pool.adapters

    async def drive(load: LoadGenerator) -> None:
        await load.run_closed(
            islice(
                session.prompts.requests(
                    None if index is None else adapters[index].name, plan.prompt, plan.output
                ),
                plan.requests,
            )
            for index in chosen
        )

    step = StepBytes.of(
        session.info.model,
        (adapters[index].packed_bytes for index in {*chosen} if index is not None),
        rows=streams,
        context=plan.prompt + plan.output / 2,
    )
    case: Case = {"streams": streams, "mix": mix}
    return await session.observe("punica", case, drive, total=streams * plan.requests, step=step)
