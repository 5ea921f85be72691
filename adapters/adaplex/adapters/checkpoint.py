"""Checkpoint: a PEFT adapter directory, read with every size checked before memory is taken.

Two files count, adapter_config.json and adapter_model.safetensors. Pickles are refused: loading
one runs code that its author chose. Format of safetensors:
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, Refusal
from adaplex.adapters.limits import AdapterLimits

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
LENGTH_BYTES = 8
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Checkpoint:
    """A config and its tensors: finite, of known dtypes, nothing else checked yet."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_checkpoint(directory: Path, limits: AdapterLimits) -> Checkpoint:
    """Reads an adapter directory. Raises AdapterInvalid or AdapterTooLarge."""
    for name in FILES:
        if not (directory / name).is_file():
            raise AdapterInvalid.because(name, "the file is missing")
    config = read_config(directory / CONFIG, limits)
    check_weights(directory / WEIGHTS, limits)
    tensors = load_file(directory / WEIGHTS)
    refusals = [
        Refusal(name, "holds NaN or infinity")
        for name, tensor in sorted(tensors.items())
        if not bool(torch.isfinite(tensor).all())
    ]
    if refusals:
        raise AdapterInvalid(refusals)
    return Checkpoint(config, tensors)


def read_config(path: Path, limits: AdapterLimits) -> dict[str, Any]:
    """The JSON object in adapter_config.json. Raises AdapterInvalid or AdapterTooLarge."""
    size = path.stat().st_size
    if size > limits.max_config_bytes:
        raise AdapterTooLarge(
            f"{CONFIG} has {size} bytes, the limit is {limits.max_config_bytes}", field=CONFIG
        )
    return _json_object(path.read_bytes(), CONFIG)


def check_weights(path: Path, limits: AdapterLimits) -> None:
    """Checks a safetensors file by its header alone. Raises AdapterInvalid or AdapterTooLarge."""
    size = path.stat().st_size
    if size > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"{WEIGHTS} has {size} bytes, the limit is {limits.max_adapter_bytes}", field=WEIGHTS
        )
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if start.startswith(PICKLE_MAGIC):
            raise AdapterInvalid.because(
                WEIGHTS, "is a pickle, which could run code; only safetensors are accepted"
            )
        length = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise AdapterInvalid.because(WEIGHTS, "is cut short: the header is not all there")
        if length > limits.max_header_bytes:
            raise AdapterTooLarge(
                f"the header of {WEIGHTS} has {length} bytes, "
                f"the limit is {limits.max_header_bytes}",
                field=WEIGHTS,
            )
        header = _json_object(file.read(length), f"the header of {WEIGHTS}")
    header.pop("__metadata__", None)
    if not header:
        raise AdapterInvalid.because(WEIGHTS, "holds no tensor")
    if len(header) > limits.max_tensors:
        raise AdapterTooLarge(
            f"{WEIGHTS} has {len(header)} tensors, the limit is {limits.max_tensors}",
            field=WEIGHTS,
        )
    refusals = list(_check_entries(header, size - LENGTH_BYTES - length))
    if refusals:
        raise AdapterInvalid(refusals)


def _check_entries(header: Mapping[str, Any], data_bytes: int) -> Iterator[Refusal]:
    """Every tensor's dtype, shape and place; together they cover the data, without overlap."""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            sizes = [begin, end, *shape]
            whole = all(type(n) is int and n >= 0 for n in sizes)
        except (KeyError, TypeError, ValueError):
            yield Refusal(name, "its header entry is malformed")
            continue
        if dtype not in DTYPE_BYTES:
            yield Refusal(name, f"has dtype {dtype!r}; accepted are {', '.join(DTYPE_BYTES)}")
        elif not whole or len(shape) > MAX_DIMENSIONS:
            yield Refusal(name, f"has no sensible shape: {shape!r:.80}")
        elif end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            yield Refusal(name, f"its {end - begin} bytes do not fit shape {shape} in {dtype}")
        else:
            spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            yield Refusal(name, "overlaps another tensor, or leaves a gap before it")
        place = end
    if len(spans) == len(header) and place != data_bytes:
        yield Refusal(WEIGHTS, f"has {data_bytes} bytes of data where the header places {place}")


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is given twice")
        return made

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid.because(where, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise AdapterInvalid.because(where, "is not a JSON object")
    return parsed
