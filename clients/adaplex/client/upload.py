"""AdapterFiles: the files of an adapter directory, and the messages of their upload."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from adaplex.client import _adapter_calls
from adaplex.client._fields import build_message
from adaplex.client.errors import AdaplexClientError, InvalidArgument
from adaplex.v1 import adapters_pb2

FILE_NAMES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTERHUB_WEIGHTS = "adapter.safetensors"
"""AdapterHub's name of the weights file; it is uploaded under PEFT's."""
SIGNATURE = "model.sig"
"""OpenSSF model signature of the other files; uploaded if it exists."""
TEXT_FILES = ("chat_template.jinja", "tokenizer_config.json", "added_tokens.json")
"""Files of a trainer's tokenizer, which are not uploaded."""
CHUNK_BYTES = 1 << 20

ProgressCallback = Callable[[int, int], None]
"""Called with bytes sent and bytes in total, on one of grpc's threads."""

T = TypeVar("T")
UploadMessage = TypeVar(
    "UploadMessage", adapters_pb2.UploadAdapterRequest, adapters_pb2.ValidateAdapterRequest
)


@dataclass(frozen=True)
class LocalFile:
    """A file to upload under `name`. `size` is in bytes, `sha256` is 64 hex digits."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class AdapterFiles:
    """The files to upload from an adapter directory: FILE_NAMES in that order, then SIGNATURE."""

    files: tuple[LocalFile, ...]
    warnings: tuple[str, ...] = ()
    """Files beside them that may matter, and are not uploaded."""

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> AdapterFiles:
        """Finds and hashes the files. Raises InvalidArgument naming one that cannot be read."""
        folder = Path(directory)
        if not folder.is_dir():
            raise InvalidArgument.because("directory", f"{folder} is not a directory")
        names = [*FILE_NAMES, *([SIGNATURE] if (folder / SIGNATURE).is_file() else [])]
        paths = {name: _path(folder, name) for name in names}
        for name, path in paths.items():
            if not path.is_file():
                raise InvalidArgument.because(name, _why_missing(folder, name))
        left_out = tuple(
            f"{name}: is not uploaded; the base's tokenizer and chat template are used"
            for name in TEXT_FILES
            if _renders_text(folder / name)
        )
        return cls(tuple(_hashed(path, name) for name, path in paths.items()), left_out)

    @property
    def total_bytes(self) -> int:
        """Total bytes of the files."""
        return sum(file.size for file in self.files)

    def messages(
        self,
        message: type[UploadMessage],
        name: str,
        *,
        replace: bool = False,
        progress: ProgressCallback | None = None,
    ) -> UploadMessages[UploadMessage]:
        """Returns the stream of an upload or a dry run: metadata, then chunks, files in order.

        `progress` is called before the first chunk and after each one.
        """
        return UploadMessages(self._messages(message, self._metadata(name, replace), progress))

    def _messages(
        self,
        message: type[UploadMessage],
        metadata: adapters_pb2.AdapterUpload,
        progress: ProgressCallback | None,
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
        return build_message(
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


class UploadMessages(Generic[T]):
    """An iterator that records its exception: grpc reports only that there was one."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise

    @contextmanager
    def raise_own_error(self) -> Iterator[None]:
        """Raises the iterator's own exception, if there was one, instead of the call's."""
        try:
            yield
        except AdaplexClientError:
            if self._error:
                raise self._error from None
            raise


def _path(folder: Path, name: str) -> Path:
    """Returns the path of a file; weights under AdapterHub's name only if PEFT's is missing."""
    path, other = folder / name, folder / ADAPTERHUB_WEIGHTS
    is_weights = name == FILE_NAMES[1]
    return other if is_weights and other.is_file() and not path.exists() else path


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


def _renders_text(path: Path) -> bool:
    """Returns True for a chat template, and for a tokenizer's config that has one or tokens."""
    if not path.is_file():
        return False
    if path.suffix != ".json":
        return True
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    if path.name == "added_tokens.json":
        return bool(found)
    return isinstance(found, dict) and bool(found.get("chat_template"))
