"""GgufFile: the metadata and tensors of a GGUF file; sizes are checked before memory is allocated.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package
makes an object of every element of every array, so a small file can fill the memory; this one
reads scalars, strings and short arrays of scalars, and skips other arrays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from torch import Tensor

from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Versions that are read, little-endian only. Version 1 had shorter counts."""
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF value type -> format of `struct`."""
STRING, ARRAY = 8, 9
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""Types that torch has too. Tensors of other types are dequantized to fp32."""

MAX_ARRAY = 1024
"""Elements of an array of scalars that is read; longer ones are skipped."""

Value = str | int | float | bool | tuple[int | float | bool, ...] | None
"""Value of a metadata key; None for an array of strings, of arrays, or of many elements."""


@dataclass(frozen=True)
class GgufTensor:
    """Place, type and shape of one tensor in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first, as in torch; GGUF has the reverse order."""
    begin: int
    """Offset in the file, in bytes."""

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * int(size)

    @property
    def read_bytes(self) -> int:
        """Bytes in memory after reading."""
        return math.prod(self.shape) * PLAIN.get(self.kind, torch.float32).itemsize


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. `read` reads its tensors."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def read(self, tensor: GgufTensor) -> Tensor:
        """Returns a tensor in its own dtype, fp32 if it is quantized. Raises AdapterInvalid."""
        data = np.fromfile(self.path, np.uint8, tensor.stored_bytes, offset=tensor.begin)
        if data.size < tensor.stored_bytes:
            reason = f"has {data.size} of its {tensor.stored_bytes} bytes: the file is cut short"
            raise AdapterInvalid.because(tensor.name, reason)
        if tensor.kind in PLAIN:
            return torch.from_numpy(data).view(PLAIN[tensor.kind]).reshape(tensor.shape)
        rows = data.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        try:
            with np.errstate(all="ignore"):
                return torch.from_numpy(dequantize(rows, tensor.kind))
        except NotImplementedError:
            raise AdapterInvalid.because(
                tensor.name, f"has type {tensor.kind.name}, which cannot be dequantized here"
            ) from None


def read_gguf(path: Path, limits: AdapterLimits) -> GgufFile:
    """Reads the header of a GGUF file. Raises AdapterInvalid or AdapterTooLarge."""
    if not path.is_file():
        raise AdapterInvalid.because(path.name, "the file is missing")
    size = path.stat().st_size
    if size > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"{path.name} has {size} bytes, the limit is {limits.max_adapter_bytes}",
            field=path.name,
        )
    with path.open("rb") as file:
        header = _Header(path.name, file.read(limits.max_header_bytes), size)
    if header.read(len(MAGIC)) != MAGIC:
        raise header.invalid("is not a GGUF file")
    if (version := header.number("I")) not in VERSIONS:
        raise header.invalid(f"has version {version}, must be 2 or 3, little-endian")
    tensors, keys = header.number("Q"), header.number("Q")
    if tensors > limits.max_tensors:
        raise AdapterTooLarge(
            f"{path.name} has {tensors} tensors, the limit is {limits.max_tensors}", field=path.name
        )
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        name = header.string()
        if name in metadata:
            raise header.invalid(f"has the key {name!r:.80} twice")
        metadata[name] = header.value()
    return GgufFile(path, metadata, _read_tensors(header, tensors, metadata))


class _Header:
    """Reads the first bytes of the file in order. A header longer than that is refused."""

    def __init__(self, name: str, data: bytes, file_bytes: int) -> None:
        self.name = name
        self.data = data
        self.file_bytes = file_bytes
        self.place = 0

    def invalid(self, reason: str) -> AdapterInvalid:
        """Returns the error of this file."""
        return AdapterInvalid.because(self.name, reason)

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes. Raises AdapterInvalid or AdapterTooLarge at their end."""
        begin, self.place = self.place, self.place + count
        if self.place > self.file_bytes:
            raise self.invalid(
                f"is cut short: it ends within its header, after {self.file_bytes} bytes"
            )
        if self.place > len(self.data):
            raise AdapterTooLarge(
                f"the header of {self.name} exceeds the limit of {len(self.data)} bytes",
                field=self.name,
            )
        return self.data[begin : self.place]

    def number(self, format: str) -> int:
        """Returns the next integer, in a format of `struct`."""
        return int(struct.unpack(f"<{format}", self.read(struct.calcsize(format)))[0])

    def string(self) -> str:
        """Returns the next string."""
        try:
            return self.read(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.invalid("has a string that is not UTF-8") from None

    def value(self) -> Value:
        """Returns the next typed value, None for an array that is skipped."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        format = self._format(kind)
        return struct.unpack(f"<{format}", self.read(struct.calcsize(format)))[0]  # type: ignore[no-any-return]

    def _array(self) -> tuple[int | float | bool, ...] | None:
        """Returns the next array, if it is a short one of scalars; skips others."""
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(count):
                self.read(self.number("Q"))
            return None
        format = self._format(kind)
        data = self.read(count * struct.calcsize(f"<{format}"))
        return struct.unpack(f"<{count}{format}", data) if count <= MAX_ARRAY else None

    def _format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.invalid(f"has a value of type {kind}, which GGUF does not define")
        return SCALARS[kind]


def _read_tensors(
    header: _Header, count: int, metadata: Mapping[str, Value]
) -> dict[str, GgufTensor]:
    """Returns the tensors by name. Each lies within the file."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment not in {1 << i for i in range(21)}:
        raise header.invalid(
            f"has general.alignment {alignment!r:.40}, must be a power of two up to 2**20"
        )
    listed = [_read_tensor(header) for _ in range(count)]
    start = -(-header.place // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in listed:
        tensor = GgufTensor(name, kind, shape, start + offset)
        if name in tensors:
            raise AdapterInvalid.because(name, "is given twice")
        if (end := tensor.begin + tensor.stored_bytes) > header.file_bytes:
            raise AdapterInvalid.because(
                name, f"ends at byte {end} of {header.name}, which has {header.file_bytes}"
            )
        tensors[name] = tensor
    return tensors


def _read_tensor(header: _Header) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """Returns name, type, shape and data offset in bytes of the next tensor."""
    name = header.string()
    dimensions = header.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise AdapterInvalid.because(
            name, f"has {dimensions} dimensions, must have 1 to {MAX_DIMENSIONS}"
        )
    shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    number = header.number("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise AdapterInvalid.because(name, f"has type {number}, which is unknown here") from None
    block, _ = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise AdapterInvalid.because(
            name, f"has shape {list(shape)}, must be whole blocks of {block}"
        )
    return name, kind, shape, header.number("Q")
