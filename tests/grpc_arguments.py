"""Which channel arguments grpc's library knows: it sets one that it does not know in silence."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import grpc


def unknown_arguments(options: Iterable[tuple[str, object]]) -> list[str]:
    """Returns the names that grpc's library has no string of."""
    return [name for name, _ in options if name.encode() not in _library()]


@cache
def _library() -> bytes:
    """The bytes of grpc's compiled library."""
    libraries = list((Path(grpc.__file__).parent / "_cython").glob("cygrpc*"))
    assert libraries, "grpc has no compiled library; unknown arguments cannot be found"
    return b"".join(path.read_bytes() for path in libraries if path.suffix in (".so", ".pyd"))
