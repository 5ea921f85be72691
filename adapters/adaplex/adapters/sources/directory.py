"""DirectorySource: local folders, /path or file:///path, under allowed roots."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adaplex.adapters.checkpoint import CONFIG, SIGNATURE, check_files_there, weights_in
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, listed
from adaplex.adapters.limits import MIB, AdapterLimits
from adaplex.adapters.sources.transfer import GGUF


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
        try:
            if real.suffix == GGUF and real.is_file():
                self._copy(real, into / real.name, self._limits.max_adapter_bytes)
                return str(real)
            _check("uri", _is_dir(real), f"must be a directory or a {GGUF} file")
            self._copy_files(real, into)
        except PermissionError as error:
            raise AdapterInvalid.because("uri", f"cannot be read: {error.strerror}") from None
        return str(real)

    def _copy_files(self, directory: Path, into: Path) -> None:
        weights = weights_in(directory).name
        names = [CONFIG, weights, *([SIGNATURE] if (directory / SIGNATURE).exists() else [])]
        sources = []
        for name in names:
            with suppress(OSError, RuntimeError):  # a loop of links; check_files_there reports it
                real = (directory / name).resolve()
                if not self._inside(real):
                    raise AdapterInvalid.because(
                        name, "is a link that leads out of --adapter-roots"
                    )
                sources.append((name, real))
        check_files_there(directory)
        left = self._limits.max_adapter_bytes
        for name, source in sources:
            left -= self._copy(source, into / name, left)

    def _copy(self, source: Path, target: Path, limit: int) -> int:
        """Copies a file of at most `limit` bytes. Returns its bytes."""
        copied = 0
        with source.open("rb") as reader, target.open("wb") as writer:
            if not stat.S_ISREG(source.stat().st_mode):
                raise AdapterInvalid.because(source.name, "is not a regular file")
            while data := reader.read(MIB):
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


def _is_dir(path: Path) -> bool:
    """Returns True for a directory that can be accessed."""
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a folder not searchable
        return False


def _check(where: str, fits: bool, reason: str) -> None:
    if not fits:
        raise AdapterInvalid.because(where, reason)
