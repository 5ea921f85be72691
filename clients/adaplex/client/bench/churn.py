"""Churn: uploads, replacements, unloads and deletions while streams run."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaplex.client.bench.adapter_pool import AdapterPool, temporary_pool
from adaplex.client.bench.checkpoint import perturb_weights, write_checkpoint
from adaplex.client.bench.load import LoadGenerator, for_seconds
from adaplex.client.bench.measures import Percentiles
from adaplex.client.bench.session import BenchRun, Session
from adaplex.client.errors import AdaplexClientError


@dataclass(frozen=True)
class ChurnPlan:
    """Streams over `adapters` adapters of this workload alone, since it replaces them.

    `prompt` and `output` are in tokens; `pause` is in seconds, between rounds of changes.
    """

    streams: int = 8
    adapters: int = 4
    rank: int = 16
    prompt: int = 64
    output: int = 64
    seconds: float = 20.0
    pause: float = 0.0


async def run_churn(session: Session, plan: ChurnPlan) -> list[BenchRun]:
    """Measures one run without changes and one with them."""
    async with temporary_pool(
        session.client,
        session.info.model.modules,
        plan.adapters,
        [plan.rank],
        seed=session.config.seed,
        progress=session.progress,
    ) as pool:
        await session.warm_up(adapter.name for adapter in pool.adapters)
        with tempfile.TemporaryDirectory() as folder:
            changes = await asyncio.to_thread(AdapterChanges, session, plan, pool, Path(folder))
            return [
                await _run(session, plan, pool, None),
                await _run(session, plan, pool, changes),
            ]


async def _run(
    session: Session, plan: ChurnPlan, pool: AdapterPool, changes: AdapterChanges | None
) -> BenchRun:
    async def drive(load: LoadGenerator) -> Mapping[str, Any]:
        changing = asyncio.create_task(changes.run()) if changes else None
        names = [pool.adapters[i % len(pool.adapters)].name for i in range(plan.streams)]
        await load.run_closed(
            for_seconds(session.prompts.requests(name, plan.prompt, plan.output), plan.seconds)
            for name in names
        )
        if changes is None or changing is None:
            return {}
        changes.stopped = True
        await changing
        return changes.summary()

    case = {"changes": "yes" if changes else "no", "streams": plan.streams}
    return await session.observe("churn", case, drive)


class AdapterChanges:
    """Changes adapters, one after the other, until `stopped` is True."""

    def __init__(self, session: Session, plan: ChurnPlan, pool: AdapterPool, folder: Path) -> None:
        self.stopped = False
        self._session, self._plan, self._pool = session, plan, pool
        self._adapters = session.client.adapters
        self._rng = random.Random(session.config.seed)
        self._directory = write_checkpoint(folder, session.info.model.modules, plan.rank, seed=-1)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._errors: Counter[str] = Counter()

    async def run(self) -> None:
        """Each round uploads, uses and deletes a new name, then replaces and unloads a used one."""
        count = 0
        while not self.stopped:
            used = self._pool.adapters[count % len(self._pool.adapters)].name
            new = f"{used}-new"
            perturb_weights(self._directory, self._rng)
            await self._timed("upload", self._adapters.upload(new, self._directory))
            await self._timed("first use", self._session.client.generate([1], **_one_token(new)))
            await self._timed("delete", self._adapters.delete(new))
            perturb_weights(self._directory, self._rng)
            await self._timed("replace", self._adapters.upload(used, self._directory, replace=True))
            await self._timed("unload", self._adapters.unload(used))
            await asyncio.sleep(self._plan.pause)
            count += 1

    def summary(self) -> dict[str, Any]:
        """Returns percentiles of each kind of change in milliseconds, and counts of its errors."""
        times = {kind: Percentiles.of(seconds) for kind, seconds in self._seconds.items()}
        return {
            "changes": {kind: asdict(found) for kind, found in times.items() if found},
            "change_errors": dict(self._errors),
        }

    async def _timed(self, kind: str, change: Awaitable[object]) -> None:
        started = time.perf_counter()
        try:
            await change
        except AdaplexClientError as error:
            self._errors[f"{kind}: {error}"] += 1
        else:
            self._seconds[kind].append(time.perf_counter() - started)


def _one_token(name: str) -> Any:
    """Returns the options of a request for one token."""
    return {"adapter": name, "max_tokens": 1, "temperature": 0.0}
