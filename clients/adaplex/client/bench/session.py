"""Session: one server under measurement, and the runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from adaplex.client.aio import AsyncClient
from adaplex.client.bench.adapter_pool import AdapterPool, stored_pool, temporary_pool
from adaplex.client.bench.load import LoadGenerator, RequestResult, adaplex_sender
from adaplex.client.bench.machine import Machine, read_bandwidth
from adaplex.client.bench.measures import Measurement
from adaplex.client.bench.process import ProcessMonitor, ProcessUsage, listening_pid
from adaplex.client.bench.progress import ProgressReporter
from adaplex.client.bench.roofline import Roofline, StepBytes
from adaplex.client.bench.scrape import Scrape, Swaps
from adaplex.client.bench.workload import Prompts
from adaplex.client.errors import FailedPrecondition, Unavailable
from adaplex.client.types import ServerInfo

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 9400
"""The server's default port of its metrics."""
WARM_UP_STREAMS = 4


@dataclass(frozen=True)
class BenchConfig:
    """How to measure. A field that is None is determined, or its figures are left out with a
    warning.
    """

    target: str
    make_adapters: int = 0
    """Number of random adapters to upload and use instead of those on the server."""
    ranks: Sequence[int] = (16,)
    """Ranks of the random adapters, in turn."""
    keep_adapters: bool = False
    """True does not delete the random adapters at the end."""
    metrics: str | None = None
    """URL of the server's metrics; by default the target's host and HTTP_PORT."""
    pid: int | None = None
    """The server's process; by default the one that listens on the target's port."""
    bandwidth: float | None = None
    """Bytes/s of the server's memory; by default measured if the server runs on this CPU."""
    first_token_bound: float = 6.0
    """Seconds until the first token that attainment allows; S-LoRA's objective."""
    seed: int = 42

    @property
    def host(self) -> str:
        """The target's host."""
        return self.target.rpartition(":")[0]

    @property
    def local(self) -> bool:
        """True if the server is on this machine."""
        return self.host in LOOPBACK


Case = Mapping[str, str | float]
"""The parameters that distinguish a run from the others of its workload."""


@dataclass(frozen=True)
class BenchRun:
    """One measurement of a workload."""

    workload: str
    case: Case = field(hash=False)
    measure: Measurement
    swaps: Mapping[str, Swaps] | None = field(hash=False)
    """Adapter loads by tier; None without metrics."""
    usage: ProcessUsage | None
    roofline: Roofline | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Figures of this workload alone."""


class Session:
    """A client, adapters and prompts for one server, and the measurement of runs on it."""

    def __init__(
        self,
        client: AsyncClient,
        config: BenchConfig,
        info: ServerInfo,
        pool: AdapterPool,
        machine: Machine,
        progress: ProgressReporter,
    ) -> None:
        self.client, self.config, self.info = client, config, info
        self.pool, self.machine, self.progress = pool, machine, progress
        self.prompts = Prompts(info.model.vocab_size, config.seed)
        self.send = adaplex_sender(client)
        self.warnings: list[str] = []
        self._monitor = self._find_process()
        self._metrics = config.metrics or f"http://{config.host}:{HTTP_PORT}/metrics"
        self._scraping = True

    async def warm_up(self, names: Iterable[str | None]) -> None:
        """Generates one token with each adapter, which loads it into memory.

        Raises FailedPrecondition naming an adapter whose request fails.
        """
        requests = (next(self.prompts.requests(name, 4, 1)) for name in names)
        load = LoadGenerator(self.send)
        await load.run_closed([requests] * WARM_UP_STREAMS)
        for result in load.results:
            if result.error:
                name = result.request.adapter or "the base"
                raise FailedPrecondition(f"{name} does not answer: {result.error}")

    async def observe(
        self,
        workload: str,
        case: Case,
        drive: Callable[[LoadGenerator], Awaitable[Mapping[str, Any] | None]],
        *,
        total: int | None = None,
        step: StepBytes | None = None,
    ) -> BenchRun:
        """Measures `drive`, which sends the requests and may return extra figures.

        `total` is the number of requests, for the progress bar; `step` the bytes that each decode
        step reads, for the roofline.
        """
        label = ", ".join([workload, *(f"{name} {value}" for name, value in case.items())])
        before = await self._scrape()
        with ExitStack() as stack:
            advance = stack.enter_context(self.progress.task(label, total))
            usage = stack.enter_context(self._monitor.measure()) if self._monitor else []
            load = LoadGenerator(self.send, lambda _: advance())
            extra = await drive(load)
        after = await self._scrape()
        measure = self.measure(load.results)
        return BenchRun(
            workload=workload,
            case=case,
            measure=measure,
            swaps=after.since(before).swaps() if before and after else None,
            usage=usage[0] if usage else None,
            roofline=self._roofline(step, measure),
            extra=extra or {},
        )

    def measure(self, results: Sequence[RequestResult]) -> Measurement:
        """Computes a measurement with this session's bound of the first token."""
        return Measurement.of(results, self.config.first_token_bound)

    def _roofline(self, step: StepBytes | None, measure: Measurement) -> Roofline | None:
        bandwidth, found = self.machine.bandwidth, measure.per_token
        if not (step and bandwidth and found and found.p50):
            return None
        return Roofline.of(step, bandwidth, found.p50)

    async def _scrape(self) -> Scrape | None:
        """Scrapes the metrics; after a failure warns once and always returns None."""
        if not self._scraping:
            return None
        try:
            return await asyncio.to_thread(Scrape.read, self._metrics)
        except Unavailable as error:
            self._scraping = False
            self.warnings.append(f"no swap times: {error}")
            return None

    def _find_process(self) -> ProcessMonitor | None:
        config = self.config
        if config.pid is None and not config.local:
            return None
        try:
            port = int(config.target.rpartition(":")[2])
            return ProcessMonitor(config.pid or listening_pid(port))
        except (RuntimeError, LookupError) as error:
            self.warnings.append(f"no processor time and memory of the server: {error}")
            return None


@asynccontextmanager
async def open_session(
    client: AsyncClient, config: BenchConfig, progress: ProgressReporter
) -> AsyncIterator[Session]:
    """Opens a session: measures the memory of an idle server, lists or uploads the adapters."""
    info = await client.server_info()
    bandwidth = config.bandwidth
    if bandwidth is None and config.local and info.model.device.startswith("cpu"):
        bandwidth = await asyncio.to_thread(read_bandwidth)
    machine = Machine.here(bandwidth)
    if not config.make_adapters:
        yield Session(client, config, info, await stored_pool(client), machine, progress)
        return
    async with temporary_pool(
        client,
        info.model.modules,
        config.make_adapters,
        config.ranks,
        seed=config.seed,
        progress=progress,
        keep=config.keep_adapters,
    ) as pool:
        yield Session(client, config, info, pool, machine, progress)


def without_modules(info: ServerInfo) -> ServerInfo:
    """Returns a server's description without its list of modules, which is long."""
    return replace(info, model=replace(info.model, modules=()))
