"""A directory tree of this machine: /path or file:///path, under allowed roots."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adaplex.adapters.checkpoint import CONFIG, SIGNATURE, check_files_there, weights_in
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import MIB, AdapterLimits
from adaplex.adapters.sources.transfer import GGUF


class DirectorySource:
    """Copies a directory, or a GGUF file, whose real paths lie under one of the roots."""

    def __init__(self, roots: Sequence[Path], limits: AdapterLimits) -> None:
        self._roots, self._limits = tuple(roots), limits

    def fetch(self, uri: str, into: Path) -> str:
        """Copies what a path or file:// URI names; its real path.

        Raises AdapterInvalid or AdapterTooLarge. Whether anything exists outside the roots is not
        told.
        """
        if not self._roots:
            raise AdapterInvalid.because("uri", "this server has no --adapter-roots to load from")
        real = self._allowed(_local_path(uri))
        try:
            if real.suffix == GGUF and real.is_file():
                self._copy(real, into / real.name, self._limits.max_adapter_bytes)
                return str(real)
            _check("uri", _is_dir(real), "must be a directory")
            self._copy_files(real, into)
        except PermissionError as error:
            raise AdapterInvalid.because("uri", f"cannot be read: {error.strerror}") from None
        return str(real)

    def _copy_files(self, directory: Path, into: Path) -> None:
        weights = weights_in(directory).name
        names = [CONFIG, weights, *([SIGNATURE] if (directory / SIGNATURE).exists() else [])]
        sources = []
        for name in names:
            with suppress(OSError, RuntimeError):  # a loop of links, found missing below
                real = (directory / name).resolve()
                if not self._inside(real):
                    raise AdapterInvalid.because(name, "leads out of the allowed folders")
                sources.append((name, real))
        check_files_there(directory)
        left = self._limits.max_adapter_bytes
        for name, source in sources:
            left -= self._copy(source, into / name, left)

    def _copy(self, source: Path, target: Path, most: int) -> int:
        """Copies a file of at most so many bytes; how many it has."""
        copied = 0
        with source.open("rb") as reader, target.open("wb") as writer:
            if not stat.S_ISREG(source.stat().st_mode):
                raise AdapterInvalid.because(source.name, "is no file")
            while data := reader.read(MIB):
                copied += len(data)
                if copied > most:
                    raise AdapterTooLarge(
                        f"the files have more than {self._limits.max_adapter_bytes} bytes, "
                        f"the limit is {self._limits.max_adapter_bytes}",
                        field="files",
                    )
                writer.write(data)
        return copied

    def _allowed(self, path: Path) -> Path:
        """The real path, if it is inside. Raises AdapterInvalid."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a loop of links; it leads nowhere, so to no root either
            real = None
        inside = real is not None and self._inside(real)
        _check("uri", inside, "must lie under one of --adapter-roots")
        assert real is not None
        return real

    def _inside(self, real: Path) -> bool:
        return any(real.is_relative_to(root.resolve()) for root in self._roots)


def _local_path(uri: str) -> Path:
    """The absolute path that a path or file:// URI names."""
    name = uri
    with suppress(ValueError):  # of brackets in a host; such a host is not here anyway
        parts = urlsplit(uri)
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            name = unquote(parts.path)
    path = Path(name)
    _check("uri", path.is_absolute() and "\0" not in name, "must be an absolute path")
    return path


def _is_dir(path: Path) -> bool:
    """Whether it is a directory; nothing that cannot be looked at is one."""
    try:
        return path.is_dir()
    except OSError:  # of a name that is too long, a folder that is closed to us
        return False


def _check(where: str, fits: bool, reason: str) -> None:
    if not fits:
        raise AdapterInvalid.because(where, reason)
