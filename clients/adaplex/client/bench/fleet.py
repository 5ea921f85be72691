"""Fleet: the adapters that a run asks."""

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
from adaplex.client.bench.progress import Progress
from adaplex.client.errors import InvalidArgument
from adaplex.client.types import AdaptableModule


@dataclass(frozen=True)
class Member:
    """One adapter; `packed_bytes` is what it takes in the device's memory."""

    name: str
    packed_bytes: int


@dataclass(frozen=True)
class Fleet:
    """Adapters in a fixed order."""

    members: tuple[Member, ...]

    def first(self, count: int) -> tuple[Member, ...]:
        """The first so many. InvalidArgument when there are fewer."""
        if count > len(self.members):
            raise InvalidArgument.because(
                "adapters",
                f"{count} are asked, and there are {len(self.members)}; "
                f"upload more, or use --make-adapters {count}",
            )
        return self.members[:count]

    def working_set(self, nbytes: float) -> tuple[Member, ...]:
        """As many as fit into so many bytes, at least one. InvalidArgument when all do."""
        total, count = 0, 0
        for member in self.members:
            total += member.packed_bytes
            if total > nbytes:
                return self.members[: max(count, 1)]
            count += 1
        raise InvalidArgument.because(
            "adapters",
            f"there are {count} of {total:,} bytes, too few to fill {int(nbytes):,} bytes; "
            "use a larger --make-adapters, or a server with a smaller --arena-bytes",
        )


async def stored(client: AsyncClient) -> Fleet:
    """Those on the server, by name."""
    return Fleet(tuple([Member(a.name, a.packed_bytes) async for a in client.adapters.list()]))


@asynccontextmanager
async def made(
    client: AsyncClient,
    modules: Sequence[AdaptableModule],
    count: int,
    ranks: Sequence[int],
    *,
    seed: int,
    progress: Progress,
    keep: bool = False,
) -> AsyncIterator[Fleet]:
    """Random ones under new names, ranks in turn; deleted at the end unless `keep`."""
    prefix = f"bench-{secrets.token_hex(3)}"
    members: list[Member] = []
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
                sent = await client.adapters.upload(f"{prefix}-{number}", directory)
                members.append(Member(sent.adapter.name, sent.adapter.packed_bytes))
                advance()
        yield Fleet(tuple(members))
    finally:
        if not keep:
            for member in members:
                await client.adapters.delete(member.name)
