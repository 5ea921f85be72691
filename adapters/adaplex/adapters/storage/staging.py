"""Staging: the files of an upload before they are stored. Nothing else can see them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

from adaplex.adapters.checkpoint import (
    CONFIG,
    FILES,
    NO_PICKLES,
    PICKLE_SUFFIXES,
    SIGNATURE,
    check_files_there,
)
from adaplex.adapters.durable_files import full_disk_is_store_full, sha256_of, sync
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileSpec:
    """A file as an upload announces it; `size` in bytes."""

    name: str
    size: int
    sha256: str
    """64 lower-case hex digits."""


def check_files(files: Sequence[FileSpec], limits: AdapterLimits) -> None:
    """Checks announced names, sizes and hashes. Raises AdapterInvalid or AdapterTooLarge."""
    names = [file.name for file in files]
    for file in files:
        if file.name.endswith(PICKLE_SUFFIXES):
            raise AdapterInvalid.because(file.name, NO_PICKLES)
        if file.name not in (*FILES, SIGNATURE):
            raise AdapterInvalid.because(
                f"{file.name!r:.200}", f"is not one of {', '.join(FILES)} and {SIGNATURE}"
            )
        if not SHA256.fullmatch(file.sha256):
            raise AdapterInvalid.because(file.name, "sha256 is not 64 lower-case hex digits")
        if file.size <= 0:
            raise AdapterInvalid.because(file.name, "is empty")
    for name in FILES:
        if names.count(name) != 1:
            raise AdapterInvalid.because(name, f"is announced {names.count(name)} times, not once")
    if names.count(SIGNATURE) > 1:
        raise AdapterInvalid.because(
            SIGNATURE, f"is announced {names.count(SIGNATURE)} times, not once"
        )
    check_total(sum(file.size for file in files), limits)
    config_bytes = next(file.size for file in files if file.name == CONFIG)
    if config_bytes > limits.max_config_bytes:
        raise AdapterTooLarge(
            f"{CONFIG} has {config_bytes} bytes, the limit is {limits.max_config_bytes}",
            field=CONFIG,
        )


def check_total(total: int, limits: AdapterLimits) -> None:
    """Checks the sum of all files' bytes. Raises AdapterTooLarge."""
    if total > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"the files have {total} bytes, the limit is {limits.max_adapter_bytes}", field="files"
        )


class Staging:
    """A folder that `write` fills in order. Leaving its `with` block removes it unless stored."""

    @full_disk_is_store_full()
    def __init__(self, directory: Path, files: Sequence[FileSpec]) -> None:
        """Makes the folder unless it exists. Raises StoreFull."""
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.files = tuple(files)
        self._hashes = [hashlib.sha256() for _ in files]
        self._written = [0] * len(files)
        self._open: tuple[int, FileIO] | None = None

    @classmethod
    def adopt(cls, directory: Path, limits: AdapterLimits) -> Staging:
        """Returns the staging of a folder that other code filled, after removing every file that
        is not an adapter's. Raises AdapterInvalid or AdapterTooLarge.
        """
        check_files_there(directory)
        for path in directory.iterdir():
            if path.name not in (*FILES, SIGNATURE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        paths = sorted(directory.iterdir())
        check_total(sum(path.stat().st_size for path in paths), limits)
        hashes = [sha256_of(path) for path in paths]
        pairs = zip(paths, hashes, strict=True)
        files = [FileSpec(p.name, p.stat().st_size, digest.hexdigest()) for p, digest in pairs]
        check_files(files, limits)
        return cls._filled(directory, files, hashes)

    @classmethod
    def of_files(cls, directory: Path, files: Sequence[FileSpec]) -> Staging:
        """Returns the staging of a folder with these files. `verify` compares them with `files`."""
        return cls._filled(directory, files, [sha256_of(directory / file.name) for file in files])

    @classmethod
    def _filled(
        cls, directory: Path, files: Sequence[FileSpec], hashes: Sequence[hashlib._Hash]
    ) -> Staging:
        """Returns the staging of a folder with these files, given the hashes of their bytes."""
        staging = cls(directory, files)
        staging._hashes = list(hashes)
        staging._written = [(directory / file.name).stat().st_size for file in files]
        return staging

    @property
    def size(self) -> int:
        """Announced bytes of all files."""
        return sum(file.size for file in self.files)

    @full_disk_is_store_full()
    def write(self, index: int, offset: int, data: bytes) -> None:
        """Appends to a file. Chunks must arrive in order, file after file.

        Raises AdapterInvalid, or StoreFull, after which the same chunk may be written again.
        """
        if not 0 <= index < len(self.files):
            raise AdapterInvalid.because(
                "chunk.file_index", f"is {index}, must be below {len(self.files)}"
            )
        file, written = self.files[index], self._written[index]
        if offset != written:
            raise AdapterInvalid.because(
                "chunk.offset", f"is {offset}, must be {written}, the bytes of {file.name} so far"
            )
        if written + len(data) > file.size:
            raise AdapterInvalid.because(
                file.name, f"has more than the {file.size} bytes announced"
            )
        descriptor, left = self._file(index).fileno(), memoryview(data)
        while left:
            left = left[os.pwrite(descriptor, left, offset + len(data) - len(left)) :]
        self._hashes[index].update(data)
        self._written[index] += len(data)

    @full_disk_is_store_full()
    def verify(self) -> None:
        """Compares every file with what was announced, and syncs it.

        Raises AdapterInvalid or StoreFull.
        """
        self._close()
        for file, written, digest in zip(self.files, self._written, self._hashes, strict=True):
            if written != file.size:
                raise AdapterInvalid.because(
                    file.name, f"has {written} of the {file.size} bytes announced"
                )
            if digest.hexdigest() != file.sha256:
                raise AdapterInvalid.because(
                    file.name, f"has SHA-256 {digest.hexdigest()}, announced was {file.sha256}"
                )
            sync(self.directory / file.name)

    def discard(self) -> None:
        """Removes the folder. Has no effect once the files are stored."""
        with suppress(OSError):
            self._close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def _file(self, index: int) -> FileIO:
        """Returns the file of this index, opened unbuffered. Only one is open at a time."""
        if self._open is None or self._open[0] != index:
            self._close()
            path = self.directory / self.files[index].name
            path.touch()
            self._open = (index, path.open("r+b", buffering=0))
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            (_, file), self._open = self._open, None
            file.close()
