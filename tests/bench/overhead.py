"""What serving costs: tokens a second through gRPC as a share of the engine's own.

    make bench-overhead                                       # the default model in nf4
    make bench-overhead ARGS="--rounds 15 --json overhead.json"

The same work in turns, prompts included, all streams asked at once: on an engine driven by this
process, and through gRPC on a server of its own. Shares are medians over the rounds, since two
turns that follow each other suffer alike from a noisy machine. The load comes from this process,
as that of users comes from theirs; on few cores it takes from the server what it spends, so it
counts as cost. `--max-stretch inf` leaves out what asking one by one costs: the first prompt is
in work when the others come, so they are paced.
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
from bench.engine import ARENA, Bench, add_common, counts, keep, open_bench
from bench.served import served

MIXES = ("base", "distinct")


@dataclass(frozen=True)
class Turn:
    """One turn of each: tokens a second of all streams together."""

    engine: float
    grpc: float
    server_cores: float
    """Processor seconds a second of the server while it was asked."""
    client_cores: float
    """The same of this process."""

    @property
    def share(self) -> float:
        """What of the engine's speed comes through."""
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
        """Of at least one turn. The share is the median of theirs, not that of the medians."""
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
    """The same work on an engine in this process and on a server."""

    def __init__(
        self, bench: Bench, session: Session, watch: ProcessMonitor, options: argparse.Namespace
    ) -> None:
        self._bench, self._session, self._watch = bench, session, watch
        self._prompt, self._output = options.prompt, options.output

    async def turn(self, streams: int, mix: str) -> Turn:
        """Each once, one after the other."""
        alone = self._alone(streams, mix)
        with self._watch.measure() as usage:
            served = await self._served(streams, mix)
        return Turn(alone, served, usage[0].cores, usage[0].client_cores)

    def _alone(self, streams: int, mix: str) -> float:
        """Tokens a second from the moment of asking, as a client counts them."""
        chosen = adapter_indices(mix, streams)
        requests = [self._bench.request(i, self._prompt, self._output) for i in chosen]
        begun = time.perf_counter()
        steps = self._bench.steps(requests)
        return sum(tokens for _, tokens in steps) / (time.perf_counter() - begun)

    async def _served(self, streams: int, mix: str) -> float:
        """Tokens a second from the first ask to the last end."""
        members, prompts = self._session.pool.adapters, self._session.prompts
        names = [None if i is None else members[i].name for i in adapter_indices(mix, streams)]
        asks = [next(prompts.requests(name, self._prompt, self._output)) for name in names]
        load = LoadGenerator(self._session.send)
        await load.run_closed([ask] for ask in asks)
        measure = self._session.measure(load.results)
        if measure.failed:
            raise RuntimeError(f"the server did not answer: {dict(measure.errors)}")
        return measure.tokens_per_second


@asynccontextmanager
async def open_duel(options: argparse.Namespace) -> AsyncIterator[Duel]:
    """Both with as many adapters in memory as there are streams."""
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
    options = parsed()
    found = []
    async with open_duel(options) as duel:
        for streams in options.streams:
            for mix in MIXES:
                await duel.turn(streams, mix)  # the first one warms up
                turns = [await duel.turn(streams, mix) for _ in range(options.rounds)]
                found.append(Overhead.of(streams, mix, turns))
                print(found[-1], flush=True)
    keep(options, overhead=found)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=counts, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stream-interval", type=int, default=1, help="tokens in a message")
    add_common(parser)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
