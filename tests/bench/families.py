"""Families: streams with an adapter of another family each, compared with LoRAs of equal bytes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from adaplex.client.bench.adapter_pool import BenchAdapter
from adaplex.client.bench.checkpoint import write_checkpoint
from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.session import BenchRun, Case, Session
from adaplex.model.base.source import resolve_model
from bench.mixture import save_mixture


@dataclass(frozen=True)
class FamiliesPlan:
    """`prompt` and `output` are in tokens; the mixes take turns for `rounds` rounds."""

    streams: Sequence[int] = (8, 16)
    prompt: int = 64
    output: int = 64
    rounds: int = 3


async def run_families(session: Session, plan: FamiliesPlan, model: str) -> list[BenchRun]:
    """Measures one run for each number of streams, round and mix. Prints for each number of streams
    the ratio of tokens a second of the families to those of LoRAs, the median of the rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        mixed = await _mixed(session, Path(folder), model, max(plan.streams))
    runs: list[BenchRun] = []
    for streams in plan.streams:
        loras = await _loras(session, mixed[:streams])
        mixes = {"families": mixed[:streams], "LoRAs": loras}
        for adapters in mixes.values():
            await session.warm_up(adapter.name for adapter in adapters)
        rates: dict[str, list[float]] = {mix: [] for mix in mixes}
        for _ in range(plan.rounds):
            for mix, adapters in mixes.items():
                runs.append(await _run(session, plan, mix, adapters))
                rates[mix].append(runs[-1].measure.tokens_per_second)
        shares = [a / b for a, b in zip(rates["families"], rates["LoRAs"], strict=True)]
        nbytes = {mix: sum(m.packed_bytes for m in adapters) for mix, adapters in mixes.items()}
        session.progress.print_line(
            f"{streams} streams: families at {median(shares):.2f} of LoRAs "
            f"({min(shares):.2f} to {max(shares):.2f}), "
            f"{nbytes['families'] / 2**20:.1f} and {nbytes['LoRAs'] / 2**20:.1f} MiB"
        )
    return runs


async def _run(
    session: Session, plan: FamiliesPlan, mix: str, adapters: Sequence[BenchAdapter]
) -> BenchRun:
    async def drive(load: LoadGenerator) -> None:
        await load.run_closed(
            [next(session.prompts.requests(adapter.name, plan.prompt, plan.output))]
            for adapter in adapters
        )

    case: Case = {"streams": len(adapters), "mix": mix}
    return await session.observe("families", case, drive, total=len(adapters))


async def _mixed(session: Session, folder: Path, model: str, count: int) -> list[BenchAdapter]:
    saved = await asyncio.to_thread(save_mixture, resolve_model(model), folder, count)
    return [
        await _upload(session, f"{family}-{number}", directory)
        for number, (family, directory) in enumerate(saved)
    ]


async def _loras(session: Session, mixed: Sequence[BenchAdapter]) -> list[BenchAdapter]:
    """Uploads as many LoRAs, of the rank whose packed bytes are nearest to those of `mixed`."""
    modules = session.info.model.modules
    with tempfile.TemporaryDirectory() as folder:
        one = await asyncio.to_thread(write_checkpoint, Path(folder), modules, 1, 0)
        probe = await _upload(session, f"rank-1-{len(mixed)}", one)
        rank = max(1, round(sum(m.packed_bytes for m in mixed) / len(mixed) / probe.packed_bytes))
        adapters = []
        for number in range(len(mixed)):
            made = await asyncio.to_thread(
                write_checkpoint, Path(folder), modules, rank, number + 1
            )
            adapters.append(await _upload(session, f"rank-{rank}-{len(mixed)}-{number}", made))
    return adapters


async def _upload(session: Session, name: str, directory: Path) -> BenchAdapter:
    sent = await session.client.adapters.upload(name, directory)
    return BenchAdapter(sent.adapter.name, sent.adapter.packed_bytes)
