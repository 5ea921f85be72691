"""GgufFile: the metadata and tensors of a GGUF file, every size checked before memory is taken.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package
makes an object of every element of every array, so it can be made to fill the memory; this one
keeps scalars and strings, and steps over arrays.
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
"""Little-endian ones: 1 had shorter counts, and big-endian files are not read."""
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
"""GGUF value type -> its format in `struct`."""
STRING, ARRAY = 8, 9
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""Kinds that torch has too; all others become fp32."""

Value = str | int | float | bool | None
"""Of a metadata key; None for an array."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file, and what it will be when it is read."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first, as torch has it; GGUF itself writes it the other way round."""
    begin: int
    """Byte of the file."""

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * int(size)

    @property
    def read_bytes(self) -> int:
        """Bytes in memory, once read."""
        return math.prod(self.shape) * PLAIN.get(self.kind, torch.float32).itemsize


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, and a way to its tensors."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def read(self, tensor: GgufTensor) -> Tensor:
        """One tensor in its own dtype, or in fp32 if it is quantized. Raises AdapterInvalid."""
        data = np.fromfile(self.path, np.uint8, tensor.stored_bytes, offset=tensor.begin)
        if data.size < tensor.stored_bytes:
            raise AdapterInvalid.because(tensor.name, "is cut short")
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
    if header.take(len(MAGIC)) != MAGIC:
        raise header.invalid("is no GGUF file")
    if (version := header.number("I")) not in VERSIONS:
        raise header.invalid(f"has version {version}; read are 2 and 3, little-endian")
    tensors, keys = header.number("Q"), header.number("Q")
    if tensors > limits.max_tensors:
        raise AdapterTooLarge(
            f"{path.name} has {tensors} tensors, the limit is {limits.max_tensors}", field=path.name
        )
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        name = header.string()
        if name in metadata:
            raise header.invalid(f"gives {name!r:.80} twice")
        metadata[name] = header.value()
    return GgufFile(path, metadata, _read_tensors(header, tensors, metadata))


class _Header:
    """A place in the first bytes of the file; what lies beyond them is refused."""

    def __init__(self, name: str, data: bytes, file_bytes: int) -> None:
        self.name = name
        self.data = data
        self.file_bytes = file_bytes
        self.place = 0

    def invalid(self, reason: str) -> AdapterInvalid:
        return AdapterInvalid.because(self.name, reason)

    def take(self, count: int) -> bytes:
        """The next bytes. Raises AdapterInvalid or AdapterTooLarge where they end."""
        begin, self.place = self.place, self.place + count
        if self.place > self.file_bytes:
            raise self.invalid("is cut short: the header is not all there")
        if self.place > len(self.data):
            raise AdapterTooLarge(
                f"the header of {self.name} has more bytes than the limit, {len(self.data)}",
                field=self.name,
            )
        return self.data[begin : self.place]

    def number(self, format: str) -> int:
        """The next integer, in a format of `struct`."""
        return int(struct.unpack(f"<{format}", self.take(struct.calcsize(format)))[0])

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.invalid("holds a string that is not UTF-8") from None

    def value(self) -> Value:
        """The next typed value; arrays are stepped over."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            self._skip_array()
            return None
        format = self._format(kind)
        return struct.unpack(f"<{format}", self.take(struct.calcsize(format)))[0]  # type: ignore[no-any-return]

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            self.take(count * struct.calcsize(self._format(kind)))

    def _format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.invalid(f"holds a value of type {kind}, which is not known")
        return SCALARS[kind]


def _read_tensors(
    header: _Header, count: int, metadata: Mapping[str, Value]
) -> dict[str, GgufTensor]:
    """The tensors by name, each whole within the file."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment not in {1 << i for i in range(21)}:
        raise header.invalid("has a general.alignment that is no power of two up to 2**20")
    listed = [_read_tensor(header) for _ in range(count)]
    start = -(-header.place // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in listed:
        tensor = GgufTensor(name, kind, shape, start + offset)
        if name in tensors:
            raise AdapterInvalid.because(name, "is given twice")
        if tensor.begin + tensor.stored_bytes > header.file_bytes:
            raise AdapterInvalid.because(name, f"ends beyond the end of {header.name}")
        tensors[name] = tensor
    return tensors


def _read_tensor(header: _Header) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """Name, kind, shape and offset in the data of the next tensor."""
    name = header.string()
    dimensions = header.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise AdapterInvalid.because(name, f"has {dimensions} dimensions; accepted are 1 to 4")
    shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    number = header.number("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise AdapterInvalid.because(name, f"has type {number}, which is not known") from None
    block, _ = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise AdapterInvalid.because(name, f"has shape {list(shape)}, not whole blocks of {block}")
    return name, kind, shape, header.number("Q")
