"""Overhead of serving: tokens a second through gRPC as a share of the engine's own.

    make bench-overhead                                       # the default model in nf4
    make bench-overhead ARGS="--rounds 15 --json overhead.json"

Runs the same requests in turns, all streams at once and prompts included: on an engine in this
process, and through gRPC on a server process. Shares are medians over the rounds, since noise of
the machine affects two neighbouring turns alike. This process generates the load; on few cores it
competes with the server, which counts as overhead. `--max-stretch inf` excludes the cost of
requests that arrive one by one: the prefill budget slows their prompts behind the first.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Self

from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.process import ProcessMonitor
from adaplex.client.bench.session import Session
from adaplex.client.bench.workload import adapter_indices
from bench.engine import ARENA, Bench, add_common, counts, open_bench, write_json
from bench.served import served

MIXES = ("base", "distinct")


@dataclass(frozen=True)
class Turn:
    """One turn of each: tokens a second of all streams, of the engine and through gRPC."""

    engine: float
    grpc: float
    server_cores: float
    """Processor seconds a second of the server during its turn."""
    client_cores: float
    """Processor seconds a second of this process during that turn."""

    @property
    def share(self) -> float:
        """Speed through gRPC as a fraction of the engine's."""
        return self.grpc / self.engine


@dataclass(frozen=True)
class Overhead:
    """The medians of a case, and the share of every round."""

    streams: int
    mix: str
    engine: float
    grpc: float
    share: float
    server_cores: float
    client_cores: float
    shares: tuple[float, ...]

    @classmethod
    def of(cls, streams: int, mix: str, turns: list[Turn]) -> Self:
        """Summarizes at least one turn. The share is the median of the turns' shares, not the ratio
        of the medians.
        """
        return cls(
            streams,
            mix,
            engine=median(turn.engine for turn in turns),
            grpc=median(turn.grpc for turn in turns),
            share=median(turn.share for turn in turns),
            server_cores=median(turn.server_cores for turn in turns),
            client_cores=median(turn.client_cores for turn in turns),
            shares=tuple(turn.share for turn in turns),
        )

    def __str__(self) -> str:
        return (
            f"{self.streams:>3} streams, {self.mix:<9}{self.engine:>7.0f} tok/s of the engine,"
            f"{self.grpc:>6.0f} through gRPC: {self.share:.0%} "
            f"({min(self.shares):.0%} to {max(self.shares):.0%}); "
            f"cores: server {self.server_cores:.2f}, client {self.client_cores:.2f}"
        )


class Duel:
    """An engine in this process and a server, which run the same requests."""

    def __init__(
        self, bench: Bench, session: Session, monitor: ProcessMonitor, options: argparse.Namespace
    ) -> None:
        self._bench, self._session, self._monitor = bench, session, monitor
        self._prompt, self._output = options.prompt, options.output

    async def turn(self, streams: int, mix: str) -> Turn:
        """Runs the engine, then the server, once each."""
        alone = self._alone(streams, mix)
        with self._monitor.measure() as usage:
            served = await self._served(streams, mix)
        return Turn(alone, served, usage[0].cores, usage[0].client_cores)

    def _alone(self, streams: int, mix: str) -> float:
        """Returns the engine's tokens a second, from the first request's arrival on."""
        chosen = adapter_indices(mix, streams)
        requests = [self._bench.request(i, self._prompt, self._output) for i in chosen]
        started = time.perf_counter()
        steps = self._bench.steps(requests)
        return sum(tokens for _, tokens in steps) / (time.perf_counter() - started)

    async def _served(self, streams: int, mix: str) -> float:
        """Returns tokens a second through gRPC, from the first request to the last end."""
        adapters, prompts = self._session.pool.adapters, self._session.prompts
        names = [None if i is None else adapters[i].name for i in adapter_indices(mix, streams)]
        requests = [next(prompts.requests(name, self._prompt, self._output)) for name in names]
        load = LoadGenerator(self._session.send)
        await load.run_closed([request] for request in requests)
        measure = self._session.measure(load.results)
        if measure.failed:
            raise RuntimeError(f"requests to the server failed: {dict(measure.errors)}")
        return measure.tokens_per_second


@asynccontextmanager
async def open_duel(options: argparse.Namespace) -> AsyncIterator[Duel]:
    """Opens both, with as many adapters in memory as there are streams."""
    adapters, settings = max(options.streams), {"threads": options.threads}
    settings |= {name: getattr(options, name) for name in ("max_stretch", "stream_interval")}
    with open_bench(options, adapters) as bench:
        async with served(
            options, arena=ARENA, adapters=adapters, bandwidth=0.0, **settings
        ) as session:
            await session.warm_up([None, *(member.name for member in session.pool.adapters)])
            assert session.config.pid is not None
            yield Duel(bench, session, ProcessMonitor(session.config.pid), options)


async def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    found = []
    async with open_duel(options) as duel:
        for streams in options.streams:
            for mix in MIXES:
                await duel.turn(streams, mix)  # the first one warms up
                turns = [await duel.turn(streams, mix) for _ in range(options.rounds)]
                found.append(Overhead.of(streams, mix, turns))
                print(found[-1], flush=True)
    write_json(options, overhead=found)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=counts, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream-interval", type=int, default=1, help="tokens of a message")
    add_common(parser)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
