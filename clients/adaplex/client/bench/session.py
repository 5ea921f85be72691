"""Session: one server under measurement, and how a run on it is observed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from adaplex.client.aio import AsyncClient
from adaplex.client.bench import fleet
from adaplex.client.bench.fleet import Fleet
from adaplex.client.bench.load import Answer, Load, adaplex_target
from adaplex.client.bench.machine import Machine, read_bandwidth
from adaplex.client.bench.measures import Measure
from adaplex.client.bench.process import ProcessWatch, Usage, listener
from adaplex.client.bench.progress import Progress
from adaplex.client.bench.roofline import Roofline, StepBytes
from adaplex.client.bench.scrape import Scrape, Swaps
from adaplex.client.bench.workload import Prompts
from adaplex.client.errors import FailedPrecondition, Unavailable
from adaplex.client.types import ServerInfo

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 9400
"""Of the server's metrics, unless it was told otherwise."""
WARM_STREAMS = 4


@dataclass(frozen=True)
class Setup:
    """How to measure. What is None is found out, or left out with a warning."""

    target: str
    make_adapters: int = 0
    """Random ones to upload instead of asking those on the server."""
    ranks: Sequence[int] = (16,)
    keep_adapters: bool = False
    metrics: str | None = None
    """URL; by default that of the target's host with the usual port."""
    pid: int | None = None
    bandwidth: float | None = None
    """Bytes/s of the memory that the server computes from."""
    first_token_bound: float = 6.0
    """Seconds, for attainment; S-LoRA's objective."""
    seed: int = 42

    @property
    def host(self) -> str:
        """Of the target."""
        return self.target.rpartition(":")[0]

    @property
    def local(self) -> bool:
        """Whether the server is on this machine."""
        return self.host in LOOPBACK


Case = Mapping[str, str | float]
"""What distinguishes a run from the others of its workload."""


@dataclass(frozen=True)
class Run:
    """One measurement of a workload."""

    workload: str
    case: Case = field(hash=False)
    measure: Measure
    swaps: Mapping[str, Swaps] | None = field(hash=False)
    """By tier; None without metrics."""
    usage: Usage | None
    roofline: Roofline | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What only this workload measures."""


class Session:
    """What every workload needs of a server."""

    def __init__(
        self,
        client: AsyncClient,
        setup: Setup,
        info: ServerInfo,
        adapters: Fleet,
        machine: Machine,
        progress: Progress,
    ) -> None:
        self.client, self.setup, self.info = client, setup, info
        self.adapters, self.machine, self.progress = adapters, machine, progress
        self.prompts = Prompts(info.model.vocab_size, setup.seed)
        self.target = adaplex_target(client)
        self.warnings: list[str] = []
        self._watch = self._find_process()
        self._metrics = setup.metrics or f"http://{setup.host}:{HTTP_PORT}/metrics"
        self._scraping = True

    async def warm(self, names: Iterable[str | None]) -> None:
        """Asks each adapter for one token, so that it is in memory. FailedPrecondition names one
        that does not answer.
        """
        asks = (next(self.prompts.asks(name, 4, 1)) for name in names)
        load = Load(self.target)
        await load.closed([asks] * WARM_STREAMS)
        for answer in load.answers:
            if answer.error:
                name = answer.ask.adapter or "the base"
                raise FailedPrecondition(f"{name} does not answer: {answer.error}")

    async def observe(
        self,
        workload: str,
        case: Case,
        drive: Callable[[Load], Awaitable[Mapping[str, Any] | None]],
        *,
        total: int | None = None,
        step: StepBytes | None = None,
    ) -> Run:
        """Runs `drive`, which makes the load and may return extras, and measures its answers.

        `total` is how many answers will come; `step` what each decode step reads.
        """
        label = ", ".join([workload, *(f"{name} {value}" for name, value in case.items())])
        before = await self._scrape()
        with ExitStack() as stack:
            advance = stack.enter_context(self.progress.task(label, total))
            usage = stack.enter_context(self._watch.watching()) if self._watch else []
            load = Load(self.target, lambda _: advance())
            extra = await drive(load)
        after = await self._scrape()
        measure = self.measure(load.answers)
        return Run(
            workload=workload,
            case=case,
            measure=measure,
            swaps=after.since(before).swaps() if before and after else None,
            usage=usage[0] if usage else None,
            roofline=self._roofline(step, measure),
            extra=extra or {},
        )

    def measure(self, answers: Sequence[Answer]) -> Measure:
        """With this session's bound."""
        return Measure.of(answers, self.setup.first_token_bound)

    def _roofline(self, step: StepBytes | None, measure: Measure) -> Roofline | None:
        bandwidth, found = self.machine.bandwidth, measure.per_token
        if not (step and bandwidth and found and found.p50):
            return None
        return Roofline.of(step, bandwidth, found.p50)

    async def _scrape(self) -> Scrape | None:
        """None once it has failed: the run goes on without."""
        if not self._scraping:
            return None
        try:
            return await asyncio.to_thread(Scrape.read, self._metrics)
        except Unavailable as error:
            self._scraping = False
            self.warnings.append(f"no swap times: {error}")
            return None

    def _find_process(self) -> ProcessWatch | None:
        setup = self.setup
        if setup.pid is None and not setup.local:
            return None
        try:
            return ProcessWatch(setup.pid or listener(int(setup.target.rpartition(":")[2])))
        except (RuntimeError, LookupError) as error:
            self.warnings.append(f"no processor time and memory of the server: {error}")
            return None


@asynccontextmanager
async def open_session(
    client: AsyncClient, setup: Setup, progress: Progress
) -> AsyncIterator[Session]:
    """Finds or makes the adapters, measures the memory while the server is idle."""
    info = await client.server_info()
    bandwidth = setup.bandwidth
    if bandwidth is None and setup.local and info.model.device.startswith("cpu"):
        bandwidth = await asyncio.to_thread(read_bandwidth)
    machine = Machine.here(bandwidth)
    if not setup.make_adapters:
        yield Session(client, setup, info, await fleet.stored(client), machine, progress)
        return
    async with fleet.made(
        client,
        info.model.modules,
        setup.make_adapters,
        setup.ranks,
        seed=setup.seed,
        progress=progress,
        keep=setup.keep_adapters,
    ) as adapters:
        yield Session(client, setup, info, adapters, machine, progress)


def without_modules(info: ServerInfo) -> ServerInfo:
    """The facts of a server that a report keeps."""
    return replace(info, model=replace(info.model, modules=()))
