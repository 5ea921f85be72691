"""AdapterFiles: the files of an adapter directory, and the messages that carry them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from adaplex.client import _adapter_calls
from adaplex.client._fields import request
from adaplex.client.errors import AdaplexClientError, InvalidArgument
from adaplex.v1 import adapters_pb2

FILE_NAMES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTERHUB_WEIGHTS = "adapter.safetensors"
"""AdapterHub's name of the second; it is sent under PEFT's."""
SIGNATURE = "model.sig"
"""OpenSSF model signature of the others; sent when it is there."""
CHUNK_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""Called with bytes sent and bytes in total, from a thread of grpc's."""

T = TypeVar("T")
UploadMessage = TypeVar(
    "UploadMessage", adapters_pb2.UploadAdapterRequest, adapters_pb2.ValidateAdapterRequest
)


@dataclass(frozen=True)
class LocalFile:
    """A file to send, and as what. `size` is in bytes, `sha256` is 64 hex digits."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class AdapterFiles:
    """What is sent of an adapter directory: FILE_NAMES in that order, then SIGNATURE."""

    files: tuple[LocalFile, ...]

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> AdapterFiles:
        """Finds and hashes the files. InvalidArgument names the one that is missing."""
        folder = Path(directory)
        if not folder.is_dir():
            raise InvalidArgument.because("directory", f"{folder} is not a directory")
        names = [*FILE_NAMES, *([SIGNATURE] if (folder / SIGNATURE).is_file() else [])]
        paths = {name: _path(folder, name) for name in names}
        for name, path in paths.items():
            if not path.is_file():
                raise InvalidArgument.because(name, _why_missing(folder, name))
        return cls(tuple(_hashed(path, name) for name, path in paths.items()))

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def messages(
        self,
        message: type[UploadMessage],
        name: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Messages[UploadMessage]:
        """The stream of an upload or a dry run: metadata, then chunks, files in order.

        `progress` is called before the first chunk and whenever one has been taken.
        """
        return Messages(self._messages(message, self._metadata(name, replace), progress))

    def _messages(
        self,
        message: type[UploadMessage],
        metadata: adapters_pb2.AdapterUpload,
        progress: Progress | None,
    ) -> Iterator[UploadMessage]:
        yield message(metadata=metadata)
        sent = 0
        if progress:
            progress(sent, self.total_bytes)
        for chunk in self._chunks():
            yield message(chunk=chunk)
            sent += len(chunk.data)
            if progress:
                progress(sent, self.total_bytes)

    def _metadata(self, name: str, replace: bool) -> adapters_pb2.AdapterUpload:
        return request(
            adapters_pb2.AdapterUpload,
            name=name,
            files=[
                adapters_pb2.AdapterFile(name=file.name, size_bytes=file.size, sha256=file.sha256)
                for file in self.files
            ],
            policy=_adapter_calls.upload_policy(replace),
        )

    def _chunks(self) -> Iterator[adapters_pb2.AdapterChunk]:
        for index, file in enumerate(self.files):
            offset = 0
            with file.path.open("rb") as source:
                while data := source.read(CHUNK_BYTES):
                    yield adapters_pb2.AdapterChunk(file_index=index, offset=offset, data=data)
                    offset += len(data)


class Messages(Generic[T]):
    """An iterator that keeps what it raised: grpc reports only that something was raised."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:
            self._failure = error
            raise

    @contextmanager
    def failing_first(self) -> Iterator[None]:
        """Raises what iterating raised, if it did, instead of what became of the call."""
        try:
            yield
        except AdaplexClientError:
            if self._failure:
                raise self._failure from None
            raise


def _path(folder: Path, name: str) -> Path:
    """Where a file lies: the weights by AdapterHub's name only where PEFT's is not there."""
    other = folder / ADAPTERHUB_WEIGHTS
    weights = name == FILE_NAMES[1]
    return other if weights and other.is_file() and not (folder / name).exists() else folder / name


def _hashed(path: Path, name: str) -> LocalFile:
    try:
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            return LocalFile(path, name, source.tell(), digest)
    except OSError as error:
        raise InvalidArgument.because(path.name, f"cannot be read: {error}") from error


def _why_missing(folder: Path, name: str) -> str:
    pickled = sorted(
        path.name
        for pattern in ("adapter_model.*", "pytorch_adapter.*")
        for path in folder.glob(pattern)
        if path.suffix != ".json"
    )
    if name.endswith(".safetensors") and pickled:
        return f"only {pickled[0]} is in {folder}; convert it to safetensors first"
    return f"missing in {folder}"
