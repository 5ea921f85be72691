"""AdapterPool: the adapters to which a benchmark's requests go."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from adaplex.client.aio import AsyncClient
from adaplex.client.bench.checkpoint import write_checkpoint
from adaplex.client.bench.progress import ProgressReporter
from adaplex.client.errors import InvalidArgument
from adaplex.client.types import AdaptableModule


@dataclass(frozen=True)
class BenchAdapter:
    """An adapter on the server; `packed_bytes` is its size in the arena."""

    name: str
    packed_bytes: int


@dataclass(frozen=True)
class AdapterPool:
    """Adapters in a fixed order."""

    adapters: tuple[BenchAdapter, ...]

    def first(self, count: int) -> tuple[BenchAdapter, ...]:
        """Returns the first `count` adapters. Raises InvalidArgument if there are fewer."""
        if count > len(self.adapters):
            raise InvalidArgument.because(
                "adapters",
                f"{count} are needed, and there are {len(self.adapters)}; "
                f"upload more, or use --make-adapters {count}",
            )
        return self.adapters[:count]

    def working_set(self, nbytes: float) -> tuple[BenchAdapter, ...]:
        """Returns as many adapters as fit into `nbytes` bytes, at least one.

        Raises InvalidArgument if all of them fit.
        """
        total, count = 0, 0
        for adapter in self.adapters:
            total += adapter.packed_bytes
            if total > nbytes:
                return self.adapters[: max(count, 1)]
            count += 1
        raise InvalidArgument.because(
            "adapters",
            f"there are {count} of {total:,} bytes, too few to fill {int(nbytes):,} bytes; "
            "use a larger --make-adapters, or a server with a smaller --arena-bytes",
        )


async def stored_pool(client: AsyncClient) -> AdapterPool:
    """Returns the adapters on the server, by name."""
    listed = client.adapters.list()
    return AdapterPool(tuple([BenchAdapter(a.name, a.packed_bytes) async for a in listed]))


@asynccontextmanager
async def temporary_pool(
    client: AsyncClient,
    modules: Sequence[AdaptableModule],
    count: int,
    ranks: Sequence[int],
    *,
    seed: int,
    progress: ProgressReporter,
    keep: bool = False,
) -> AsyncIterator[AdapterPool]:
    """Uploads `count` random adapters under new names, of the ranks in turn.

    Deletes them at the end unless `keep`.
    """
    prefix = f"bench-{secrets.token_hex(3)}"
    adapters: list[BenchAdapter] = []
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            progress.task("uploading adapters", count) as advance,
        ):
            for number in range(count):
                rank = ranks[number % len(ranks)]
                directory = await asyncio.to_thread(
                    write_checkpoint, Path(folder), modules, rank, seed + number
                )
                result = await client.adapters.upload(f"{prefix}-{number}", directory)
                adapters.append(BenchAdapter(result.adapter.name, result.adapter.packed_bytes))
                advance()
        yield AdapterPool(tuple(adapters))
    finally:
        if not keep:
            for adapter in adapters:
                await client.adapters.delete(adapter.name)
