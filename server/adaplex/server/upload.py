"""Receiving an adapter: metadata first, then every byte of every file, in order, no gaps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from adaplex.adapters.registry.intake import Intake
from adaplex.adapters.storage.staging import FileSpec, Staging
from adaplex.server import adapter_messages as messages
from adaplex.server.config import MAX_CHUNK_BYTES
from adaplex.server.convert import check
from adaplex.server.errors import UploadIdle, UploadsBusy
from adaplex.server.threads import in_thread, owned
from adaplex.v1.adapters_pb2 import AdapterChunk, UploadAdapterRequest, ValidateAdapterRequest

UploadMessage = UploadAdapterRequest | ValidateAdapterRequest
"""Metadata in the first message, a chunk in every other."""


@dataclass(frozen=True)
class Received:
    """A whole upload, staged; its hashes are verified when it is checked or stored."""

    name: str
    replace: bool
    staging: Staging


class Receiver:
    """Takes uploads in, a bounded number at once."""

    def __init__(self, intake: Intake, *, max_uploads: int, idle_timeout: float) -> None:
        self._intake = intake
        self._max_uploads, self._idle_timeout = max_uploads, idle_timeout
        self._under_way = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the places for taking an adapter in. Raises UploadsBusy, never waits."""
        if self._under_way >= self._max_uploads:
            raise UploadsBusy(self._max_uploads)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    @asynccontextmanager
    async def receive(self, parts: AsyncIterator[UploadMessage]) -> AsyncIterator[Received]:
        """Reads a stream to its end. What was not committed is discarded afterwards."""
        async with self.slot():
            first = await self._next(parts)
            given = first is not None and first.HasField("metadata")
            check("metadata", given, "must be the first message")
            assert first is not None
            upload = first.metadata
            self._intake.check_name(upload.name)
            replace = messages.replaces("metadata.policy", upload.policy)
            files = messages.file_specs(upload)
            stage = partial(self._intake.stage, files)
            async with owned(stage, Staging.discard) as staging:
                await self._fill(staging, files, parts)
                yield Received(upload.name, replace, staging)

    async def _fill(
        self, staging: Staging, files: list[FileSpec], parts: AsyncIterator[UploadMessage]
    ) -> None:
        """Writes every chunk, each checked against what must come next."""
        index, offset = 0, 0
        while (message := await self._next(parts)) is not None:
            check("metadata", message.HasField("chunk"), "must be sent once, then only chunks")
            chunk = message.chunk
            while index < len(files) and offset == files[index].size:
                index, offset = index + 1, 0
            _check_chunk(chunk, files, index, offset)
            await in_thread(staging.write, index, offset, chunk.data)
            offset += len(chunk.data)
        _check_complete(files, index, offset)

    async def _next(self, parts: AsyncIterator[UploadMessage]) -> UploadMessage | None:
        """The next message, None at the end. Raises UploadIdle when none comes."""
        try:
            async with asyncio.timeout(self._idle_timeout):
                return await anext(parts, None)
        except TimeoutError:
            raise UploadIdle(self._idle_timeout) from None


def _check_chunk(chunk: AdapterChunk, files: list[FileSpec], index: int, offset: int) -> None:
    """Whether a chunk is the next one: of this file, at this offset, within its size."""
    check("chunk.file_index", index < len(files), "every announced byte was sent already")
    check("chunk.file_index", chunk.file_index == index, f"must be {index}")
    check("chunk.offset", chunk.offset == offset, f"must be {offset}")
    size = len(chunk.data)
    check("chunk.data", 1 <= size <= MAX_CHUNK_BYTES, f"must hold 1 to {MAX_CHUNK_BYTES} bytes")
    announced = files[index].size
    check(
        "chunk.data",
        offset + size <= announced,
        f"must end within the {announced} bytes announced for {files[index].name}",
    )


def _check_complete(files: list[FileSpec], index: int, offset: int) -> None:
    """Whether the stream ended where the last file does."""
    sent = sum(file.size for file in files[:index]) + offset
    total = sum(file.size for file in files)
    check("chunk", sent == total, f"the stream ended after {sent} of {total} bytes")
