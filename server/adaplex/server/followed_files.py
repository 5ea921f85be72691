"""FollowedFiles: a value that is read from files, and read again when they change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from adaplex.server.errors import ConfigError
from adaplex.server.file_stamp import FileStamp, file_stamp

T = TypeVar("T")

log = structlog.get_logger("adaplex.files")


class FollowedFiles(Generic[T]):
    """The value of some files. Files that became wrong are logged once for each change, and the
    last good value stays. Thread-safe.
    """

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """`read` raises ConfigError for files that are wrong; so does this."""
        self._name, self._paths, self._read = name, paths, read
        self._lock = threading.Lock()
        self._stamps = self._stamp()
        self._value = read()
        self._generation = 0

    def current(self) -> tuple[int, T]:
        """Returns the number of the value, which rises with each change, and the value."""
        stamps = self._stamp()
        with self._lock:
            if stamps != self._stamps:
                self._stamps = stamps
                try:
                    self._value = self._read()
                    self._generation += 1
                    log.info(f"{self._name} changed", files=[*map(str, self._paths)])
                except ConfigError as error:
                    log.error(f"{self._name} not changed", error=str(error))
            return self._generation, self._value

    def _stamp(self) -> tuple[FileStamp, ...]:
        return tuple(map(file_stamp, self._paths))
