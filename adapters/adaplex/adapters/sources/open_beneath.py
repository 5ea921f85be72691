"""Opens paths below a folder without following links and without waiting, so that what was checked
is what is read, whatever becomes of the path meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of what is read: a link is an error (ELOOP), and a FIFO does not wait for its writer."""
PASS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of the folders on the way, which need not be readable."""
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)


class NotRegular(OSError):
    """The path is neither a regular file nor an allowed directory; `strerror` is what it is."""


@contextmanager
def opened_beneath(root: Path, real: Path, *, directory: bool = False) -> Iterator[int]:
    """Yields a descriptor of `real`, a path below `root` that has no links.

    Raises NotRegular if it is not a regular file, nor a directory where `directory` allows one, and
    OSError otherwise, also if a part of the path has become a link.
    """
    parts = real.relative_to(root).parts
    folder = os.open(root, PASS & ~os.O_NOFOLLOW)
    try:
        for part in parts[:-1]:
            below = os.open(part, PASS, dir_fd=folder)
            os.close(folder)
            folder = below
        with opened_in(folder, parts[-1] if parts else ".", directory=directory) as found:
            yield found
    finally:
        os.close(folder)


@contextmanager
def opened_in(folder: int, name: str, *, directory: bool = False) -> Iterator[int]:
    """Yields a descriptor of a file in the folder of a descriptor. Raises as `opened_beneath`."""
    _check(os.stat(name, dir_fd=folder, follow_symlinks=False), directory)  # devices stay closed
    found = os.open(name, READ, dir_fd=folder)
    try:
        _check(os.fstat(found), directory)
        yield found
    finally:
        os.close(found)


def _check(status: os.stat_result, directory: bool) -> None:
    """Raises NotRegular."""
    if stat.S_ISREG(status.st_mode) or (directory and stat.S_ISDIR(status.st_mode)):
        return
    kind = next((name for is_kind, name in KINDS if is_kind(status.st_mode)), "of another kind")
    raise NotRegular(errno.EINVAL, kind)
