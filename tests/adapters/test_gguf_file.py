"""GGUF files with false headers are refused before memory is allocated."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.gguf.file import read_gguf

LIMITS = AdapterLimits()
HEADER_START = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1s", 1, b"k")
"""Start of a file with one key, up to its type."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), "cut short"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "has version 1"),
        (HEADER_START + struct.pack("<IIQ", 9, 0, 1 << 60), "cut short"),
        (HEADER_START + struct.pack("<IIQ", 9, 8, 1 << 60), "cut short"),
        (
            HEADER_START + struct.pack("<IIQ", 9, 9, 1),
            "a value of type 9, which GGUF does not define",
        ),
        (HEADER_START + struct.pack("<IQ", 8, (1 << 64) - 1), "cut short"),
        (HEADER_START + struct.pack("<IQ1s", 8, 1, b"\xff"), "not UTF-8"),
        (HEADER_START + struct.pack("<I", 99), "a value of type 99, which GGUF does not define"),
    ],
)
def test_a_header_that_lies_is_refused_at_once(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(content)
    with pytest.raises(AdapterInvalid, match=f"lora.gguf: .*{reason}"):
        read_gguf(file, LIMITS)


def with_tensors(*tensors: tuple[str, tuple[int, ...], int, int]) -> bytes:
    """Returns a file with 64 bytes of data and these tensors: name, dimensions, type, offset."""
    made = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0)
    for name, dimensions, kind, offset in tensors:
        made += struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), len(dimensions))
        made += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
    return made + bytes(-len(made) % 32) + bytes(64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (with_tensors(("t", (17,), 0, 0)), r"t: ends at byte \d+ of .*, which has \d+"),
        (with_tensors(("t", (4,), 0, 1 << 63)), r"t: ends at byte \d+ of .*, which has \d+"),
        (
            with_tensors(("t", ((1 << 64) - 1,) * 4, 0, 0)),
            r"t: ends at byte \d+ of .*, which has \d+",
        ),
        (with_tensors(("t", (4, 0), 0, 0)), r"t: has shape \[0, 4\]"),
        (with_tensors(("t", (31,), 8, 0)), "t: has shape .* must be whole blocks of 32"),
        (with_tensors(("t", (1,) * 5, 0, 0)), "t: has 5 dimensions"),
        (with_tensors(("t", (), 0, 0)), "t: has 0 dimensions"),
        (with_tensors(("t", (1,), 250, 0)), "t: has type 250"),
        (with_tensors(("t", (1,), 0, 0), ("t", (1,), 0, 4)), "t: is given twice"),
    ],
)
def test_tensors_that_cannot_be_there_are_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(with_tensors(("t", (4, 4), 0, 0)))
    assert read_gguf(file, LIMITS).tensors["t"].shape == (4, 4)
    file.write_bytes(content)
    with pytest.raises(AdapterInvalid, match=reason):
        read_gguf(file, LIMITS)
