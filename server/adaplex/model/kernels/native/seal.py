"""Seals of built libraries: a hash at the end of the file, compared before the file is loaded.

A library that was cut short or changed on the disk would end the process while it is loaded or in
the middle of a step. An ELF file may have bytes behind its sections, so the hash is in the file
itself, and both are there or neither.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from adaplex.adapters.durable_files import sync

MARK = b"adaplex kernels, SHA-256 "
"""Begins a seal; the hex digits of the hash follow, and the file ends."""
SEAL_BYTES = len(MARK) + 64


def seal(library: Path) -> None:
    """Appends the hash of a library to it, and flushes it to the disk. Raises OSError."""
    content = library.read_bytes()
    with library.open("ab") as file:
        file.write(_seal_of(content))
    sync(library)


def is_intact(library: Path) -> bool:
    """Returns True if a library is exactly as it was sealed. Raises OSError."""
    content = library.read_bytes()
    return content[-SEAL_BYTES:] == _seal_of(content[:-SEAL_BYTES])


def _seal_of(content: bytes) -> bytes:
    return MARK + hashlib.sha256(content).hexdigest().encode()
