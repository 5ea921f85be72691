"""Receiver: receives uploads: metadata, then every byte of every file in order, without gaps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from adaplex.adapters.api import FileSpec, Intake, Staging
from adaplex.server import adapter_messages as messages
from adaplex.server.config import MAX_CHUNK_BYTES
from adaplex.server.errors import UploadIdle, UploadsBusy
from adaplex.server.generation_messages import check
from adaplex.server.slots import Slots
from adaplex.server.threads import in_thread, owned
from adaplex.v1.adapters_pb2 import AdapterChunk, UploadAdapterRequest, ValidateAdapterRequest

UploadMessage = UploadAdapterRequest | ValidateAdapterRequest
"""The first message has metadata, every later one a chunk."""


@dataclass(frozen=True)
class Received:
    """A complete upload in a staging folder. Check and commit verify its hashes."""

    name: str
    replace: bool
    staging: Staging


class Receiver:
    """Receives a bounded number of uploads at once."""

    def __init__(self, intake: Intake, *, max_uploads: int, idle_timeout: float) -> None:
        self._intake, self._idle_timeout = intake, idle_timeout
        self._slots = Slots(max_uploads, lambda: UploadsBusy(max_uploads))

    def slot(self) -> AbstractContextManager[None]:
        """Occupies one of the upload slots for the block. Raises UploadsBusy, never waits."""
        return self._slots.slot()

    @asynccontextmanager
    async def receive(self, stream: AsyncIterator[UploadMessage]) -> AsyncIterator[Received]:
        """Reads a stream to its end, and removes the staged files unless they were committed.

        Raises RequestInvalid, UploadsBusy, UploadIdle, and as Intake.
        """
        with self.slot():
            first = await self._next(stream)
            given = first is not None and first.HasField("metadata")
            check("metadata", given, "must be the first message")
            assert first is not None
            upload = first.metadata
            self._intake.check_name(upload.name)
            replace = messages.replaces("metadata.policy", upload.policy)
            files = messages.file_specs(upload)
            stage = partial(self._intake.stage, files)
            async with owned(stage, Staging.discard) as staging:
                await self._fill(staging, files, stream)
                yield Received(upload.name, replace, staging)

    async def _fill(
        self, staging: Staging, files: list[FileSpec], stream: AsyncIterator[UploadMessage]
    ) -> None:
        """Writes the chunks, each checked to be the next one."""
        index, offset = 0, 0
        while (message := await self._next(stream)) is not None:
            check("metadata", message.HasField("chunk"), "must be sent once, then only chunks")
            chunk = message.chunk
            while index < len(files) and offset == files[index].size:
                index, offset = index + 1, 0
            _check_chunk(chunk, files, index, offset)
            await in_thread(staging.write, index, offset, chunk.data)
            offset += len(chunk.data)
        _check_complete(files, index, offset)

    async def _next(self, stream: AsyncIterator[UploadMessage]) -> UploadMessage | None:
        """Returns the next message, None at the end. Raises UploadIdle after `idle_timeout`."""
        try:
            async with asyncio.timeout(self._idle_timeout):
                return await anext(stream, None)
        except TimeoutError:
            raise UploadIdle(self._idle_timeout) from None


def _check_chunk(chunk: AdapterChunk, files: list[FileSpec], index: int, offset: int) -> None:
    """Raises RequestInvalid unless the chunk continues this file at this offset."""
    check("chunk.file_index", index < len(files), "must not follow the last announced byte")
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
    """Raises RequestInvalid unless the stream ended with the last file."""
    sent = sum(file.size for file in files[:index]) + offset
    total = sum(file.size for file in files)
    check("chunk", sent == total, f"the stream ended after {sent} of {total} announced bytes")
