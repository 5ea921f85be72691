"""Churn: uploads, replacements, unloads and deletions while streams run, and the same without."""

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

from adaplex.client.bench import fleet
from adaplex.client.bench.checkpoint import renew, write_checkpoint
from adaplex.client.bench.fleet import Fleet
from adaplex.client.bench.load import Load, lasting
from adaplex.client.bench.measures import Percentiles
from adaplex.client.bench.session import Run, Session
from adaplex.client.errors import AdaplexClientError


@dataclass(frozen=True)
class Churn:
    """Adapters of its own, since it replaces them. `pause` is in seconds between changes."""

    streams: int = 8
    adapters: int = 4
    rank: int = 16
    prompt: int = 64
    output: int = 64
    seconds: float = 20.0
    pause: float = 0.0


async def churn(session: Session, plan: Churn) -> list[Run]:
    """One run without changes, one with them."""
    async with fleet.made(
        session.client,
        session.info.model.modules,
        plan.adapters,
        [plan.rank],
        seed=session.setup.seed,
        progress=session.progress,
    ) as own:
        await session.warm(member.name for member in own.members)
        with tempfile.TemporaryDirectory() as folder:
            changes = await asyncio.to_thread(Changes, session, plan, own, Path(folder))
            return [await _run(session, plan, own, None), await _run(session, plan, own, changes)]


async def _run(session: Session, plan: Churn, own: Fleet, changes: Changes | None) -> Run:
    async def drive(load: Load) -> Mapping[str, Any]:
        changing = asyncio.create_task(changes.go_on()) if changes else None
        names = [own.members[i % len(own.members)].name for i in range(plan.streams)]
        await load.closed(
            lasting(session.prompts.asks(name, plan.prompt, plan.output), plan.seconds)
            for name in names
        )
        if changes is None or changing is None:
            return {}
        changes.enough = True
        await changing
        return changes.told()

    case = {"changes": "yes" if changes else "no", "streams": plan.streams}
    return await session.observe("churn", case, drive)


class Changes:
    """Changes adapters, one after the other, until it is enough."""

    def __init__(self, session: Session, plan: Churn, own: Fleet, folder: Path) -> None:
        self.enough = False
        self._session, self._adapters, self._plan, self._own = (
            session,
            session.client.adapters,
            plan,
            own,
        )
        self._dice = random.Random(session.setup.seed)
        self._directory = write_checkpoint(folder, session.info.model.modules, plan.rank, seed=-1)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._errors: Counter[str] = Counter()

    async def go_on(self) -> None:
        """A name comes, is asked and goes; one in use is replaced, another unloaded."""
        round_ = 0
        while not self.enough:
            used = self._own.members[round_ % len(self._own.members)].name
            new = f"{used}-new"
            renew(self._directory, self._dice)
            await self._timed("upload", self._adapters.upload(new, self._directory))
            await self._timed("first use", self._session.client.generate([1], **_once(new)))
            await self._timed("delete", self._adapters.delete(new))
            renew(self._directory, self._dice)
            await self._timed("replace", self._adapters.upload(used, self._directory, replace=True))
            await self._timed("unload", self._adapters.unload(used))
            await asyncio.sleep(self._plan.pause)
            round_ += 1

    def told(self) -> dict[str, Any]:
        """Milliseconds of each kind of change, and what failed."""
        times = {kind: Percentiles.of(seconds) for kind, seconds in self._seconds.items()}
        return {
            "changes": {kind: asdict(found) for kind, found in times.items() if found},
            "change_errors": dict(self._errors),
        }

    async def _timed(self, kind: str, change: Awaitable[object]) -> None:
        begun = time.perf_counter()
        try:
            await change
        except AdaplexClientError as error:
            self._errors[f"{kind}: {error}"] += 1
        else:
            self._seconds[kind].append(time.perf_counter() - begun)


def _once(name: str) -> Any:
    """Options of a request for one token."""
    return {"adapter": name, "max_tokens": 1, "temperature": 0.0}
