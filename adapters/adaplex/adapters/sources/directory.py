"""DirectorySource: local folders, /path or file:///path, under allowed roots."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adaplex.adapters.checkpoint import (
    ADAPTERHUB_WEIGHTS,
    CONFIG,
    SIGNATURE,
    WEIGHTS,
    check_names,
)
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, listed
from adaplex.adapters.limits import MIB, AdapterLimits
from adaplex.adapters.sources.open_beneath import NotRegular, opened_beneath, opened_in
from adaplex.adapters.sources.transfer import GGUF
from adaplex.adapters.text_files import TEXT_FILES

NEITHER = f"must be a directory or a {GGUF} file"


class DirectorySource:
    """Copies folders and GGUF files whose real paths lie under one of the roots."""

    def __init__(self, roots: Sequence[Path], limits: AdapterLimits) -> None:
        self._roots, self._limits = tuple(roots), limits

    def fetch(self, uri: str, into: Path) -> str:
        """Copies the folder or GGUF file at a path or file:// URI. Returns its real path.

        Raises AdapterInvalid or AdapterTooLarge. Errors do not show whether a path outside the
        roots exists.
        """
        if not self._roots:
            raise AdapterInvalid.because(
                "uri", "names a local path, and this server has no --adapter-roots"
            )
        real = self._allowed(_local_path(uri))
        with ExitStack() as stack:
            try:
                found = stack.enter_context(
                    opened_beneath(self._root_of(real), real, directory=True)
                )
            except NotRegular as error:
                raise AdapterInvalid.because("uri", f"is {error.strerror}; it {NEITHER}") from None
            except PermissionError as error:
                raise AdapterInvalid.because("uri", f"cannot be read: {error.strerror}") from None
            except OSError:  # it does not exist, or a part of the path was swapped for a link
                raise AdapterInvalid.because("uri", NEITHER) from None
            if stat.S_ISDIR(os.fstat(found).st_mode):
                self._copy_files(real, found, into)
            else:
                _check("uri", real.suffix == GGUF, NEITHER)
                self._copy(found, into / real.name, self._limits.max_adapter_bytes)
        return str(real)

    def _copy_files(self, directory: Path, opened: int, into: Path) -> None:
        """Copies the files of an adapter from a directory and its descriptor."""
        present = set(os.listdir(opened))
        check_names(present)
        weights = WEIGHTS if WEIGHTS in present else ADAPTERHUB_WEIGHTS
        left = self._limits.max_adapter_bytes
        for name in (CONFIG, weights, SIGNATURE):
            if name in present:
                with self._opened(directory, opened, name) as file:
                    left -= self._copy(file, into / name, left)
        for name in present.intersection(TEXT_FILES):
            with suppress(AdapterInvalid), self._opened(directory, opened, name) as file:
                if os.fstat(file).st_size <= min(left, self._limits.max_header_bytes):
                    left -= self._copy(file, into / name, left)

    @contextmanager
    def _opened(self, directory: Path, opened: int, name: str) -> Iterator[int]:
        """Yields a descriptor of a file of the directory. A link is resolved once, and what it
        leads to is opened without following links. Raises AdapterInvalid.
        """
        with ExitStack() as stack:
            try:
                if stat.S_ISLNK(os.stat(name, dir_fd=opened, follow_symlinks=False).st_mode):
                    try:
                        real = (directory / name).resolve()
                    except RuntimeError as error:  # a loop, in earlier Pythons
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
                    _check(name, self._inside(real), "is a link that leads out of --adapter-roots")
                    file = stack.enter_context(opened_beneath(self._root_of(real), real))
                else:
                    file = stack.enter_context(opened_in(opened, name))
            except NotRegular as error:
                raise AdapterInvalid.because(
                    name, f"is {error.strerror}, not a regular file; put the file itself there"
                ) from None
            except OSError as error:
                raise AdapterInvalid.because(name, f"cannot be read: {error.strerror}") from None
            yield file

    def _copy(self, source: int, target: Path, limit: int) -> int:
        """Copies an open file of at most `limit` bytes. Returns its bytes."""
        copied = 0
        with target.open("wb") as writer:
            while data := os.read(source, MIB):
                copied += len(data)
                if copied > limit:
                    raise AdapterTooLarge(
                        f"the files exceed the limit of {self._limits.max_adapter_bytes} bytes",
                        field="files",
                    )
                writer.write(data)
        return copied

    def _allowed(self, path: Path) -> Path:
        """Returns the real path if it lies under a root. Raises AdapterInvalid."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            real = None
        inside = real is not None and self._inside(real)
        _check("uri", inside, f"must lie under one of --adapter-roots: {listed(self._roots)}")
        assert real is not None
        return real

    def _inside(self, real: Path) -> bool:
        return any(real.is_relative_to(root.resolve()) for root in self._roots)

    def _root_of(self, real: Path) -> Path:
        """Returns the real path of a root that an allowed path lies under."""
        return next(r for root in self._roots if real.is_relative_to(r := root.resolve()))


def _local_path(uri: str) -> Path:
    """Returns the absolute path that a path or file:// URI names. Raises AdapterInvalid."""
    name = uri
    with suppress(ValueError):  # brackets in a host; no host is local then
        parts = urlsplit(uri)
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            name = unquote(parts.path)
    path = Path(name)
    _check("uri", path.is_absolute() and "\0" not in name, "must be an absolute path")
    return path


def _check(where: str, fits: bool, reason: str) -> None:
    if not fits:
        raise AdapterInvalid.because(where, reason)
