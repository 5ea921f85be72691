"""Checkpoint: an adapter directory, read with every size checked before memory is allocated.

Two files are read: adapter_config.json and adapter_model.safetensors (AdapterHub names the latter
adapter.safetensors). Pickles are refused, because loading one runs code chosen by its author.
Safetensors format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, Refusal
from adaplex.adapters.limits import AdapterLimits

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
ADAPTERHUB_WEIGHTS = "adapter.safetensors"
"""AdapterHub's name of the weights file. Sources and clients import it as WEIGHTS."""
SIGNATURE = "model.sig"
"""OpenSSF model signature of the other files; optional."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element of each accepted dtype. Few formats accept integers, which are indices."""
COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
"""Types of floating-point tensors in a Checkpoint; others are read as float32."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
LENGTH_BYTES = 8
"""Bytes of the header's length, at the beginning of a safetensors file."""
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 48
"""Elements of a tensor; a size of 0 counts as 1, because AdaLoRA saves pruned pairs as [0, in]."""
MAX_DEPTH = 16
"""Levels of nested lists and objects in a JSON file."""
ENTRY = {"dtype", "shape", "data_offsets"}
"""Keys of a tensor's entry in the header."""
NO_PICKLES = "is a pickle, which could run code; only safetensors are accepted"


@dataclass(frozen=True)
class Checkpoint:
    """A config and its tensors, which are finite and of known dtypes. Nothing else is checked."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_checkpoint(directory: Path, limits: AdapterLimits) -> Checkpoint:
    """Reads an adapter directory. Raises AdapterInvalid or AdapterTooLarge."""
    check_files_there(directory)
    config = read_config(directory / CONFIG, limits)
    weights = weights_in(directory)
    check_weights(weights, limits)
    try:
        tensors = {name: _as_computed(tensor) for name, tensor in load_file(weights).items()}
    except SafetensorError as error:
        raise AdapterInvalid.because(WEIGHTS, f"is not a safetensors file: {error}") from None
    refusals = [
        Refusal(name, "contains NaN or infinity")
        for name, tensor in sorted(tensors.items())
        if not bool(torch.isfinite(tensor).all())
    ]
    if refusals:
        raise AdapterInvalid(refusals)
    return Checkpoint(config, tensors)


def _as_computed(tensor: Tensor) -> Tensor:
    """Returns a tensor in a type of COMPUTED, or of integers; float64 is rounded to float32."""
    plain = tensor.dtype in COMPUTED or not tensor.is_floating_point()
    return tensor if plain else tensor.float()


def write_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes the two files of an adapter directory. Equal checkpoints give equal bytes."""
    (directory / CONFIG).write_text(json.dumps(dict(checkpoint.config), indent=1))
    save_file(dict(checkpoint.tensors), directory / WEIGHTS)


def weights_in(directory: Path) -> Path:
    """Returns the path of the weights: AdapterHub's name only if PEFT's does not exist."""
    other = directory / ADAPTERHUB_WEIGHTS
    peft = directory / WEIGHTS
    return other if other.is_file() and not os.path.lexists(peft) else peft


def check_files_there(directory: Path) -> None:
    """Raises AdapterInvalid if a file is missing, naming a pickle that is in its place."""
    paths = directory.iterdir() if directory.is_dir() else ()
    check_names({path.name for path in paths if path.is_file()})


def check_names(present: Collection[str]) -> None:
    """Raises AdapterInvalid if the names of a directory's files lack one, naming a pickle that is
    in its place.
    """
    for name in FILES:
        if name in present or (name == WEIGHTS and ADAPTERHUB_WEIGHTS in present):
            continue
        pickles = sorted(other for other in present if other.endswith(PICKLE_SUFFIXES))
        if name == WEIGHTS and pickles:
            raise AdapterInvalid.because(pickles[0], NO_PICKLES)
        raise AdapterInvalid.because(name, "the file is missing")


def read_config(path: Path, limits: AdapterLimits) -> dict[str, Any]:
    """Returns the object in adapter_config.json. Raises AdapterInvalid or AdapterTooLarge."""
    size = path.stat().st_size
    if size > limits.max_config_bytes:
        raise AdapterTooLarge(
            f"{CONFIG} has {size} bytes, the limit is {limits.max_config_bytes}", field=CONFIG
        )
    return _json_object(path.read_bytes(), CONFIG)


def check_weights(path: Path, limits: AdapterLimits) -> None:
    """Checks the header of a safetensors file. Raises AdapterInvalid or AdapterTooLarge."""
    size = path.stat().st_size
    if size > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"{WEIGHTS} has {size} bytes, the limit is {limits.max_adapter_bytes}", field=WEIGHTS
        )
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            # checked here alone: a valid length may begin like a pickle (640 is 80 02)
            if start.startswith(PICKLE_MAGIC):
                raise AdapterInvalid.because(WEIGHTS, NO_PICKLES)
            raise AdapterInvalid.because(WEIGHTS, "is truncated: the header is incomplete")
        if length > limits.max_header_bytes:
            raise AdapterTooLarge(
                f"the header of {WEIGHTS} has {length} bytes, "
                f"the limit is {limits.max_header_bytes}",
                field=WEIGHTS,
            )
        header = _json_object(file.read(length), f"the header of {WEIGHTS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterInvalid.because(f"{WEIGHTS} __metadata__", "does not map strings to strings")
    if not header:
        raise AdapterInvalid.because(WEIGHTS, "contains no tensor")
    if len(header) > limits.max_tensors:
        raise AdapterTooLarge(
            f"{WEIGHTS} has {len(header)} tensors, the limit is {limits.max_tensors}",
            field=WEIGHTS,
        )
    refusals = list(_check_entries(header, size - LENGTH_BYTES - length))
    if refusals:
        raise AdapterInvalid(refusals)


def _check_entries(header: Mapping[str, Any], data_bytes: int) -> Iterator[Refusal]:
    """Yields refusals of header entries: each tensor's dtype, shape and offsets must be valid, and
    together the tensors must cover the data without overlap.
    """
    spans = []
    for name, entry in header.items():
        if (problem := _entry_problem(entry)) is not None:
            yield Refusal(name, problem)
            continue
        begin, end = entry["data_offsets"]
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            yield Refusal(name, "overlaps another tensor, or leaves a gap before it")
        place = end
    if len(spans) == len(header) and place != data_bytes:
        yield Refusal(WEIGHTS, f"has {data_bytes} bytes of data where the header places {place}")


def _entry_problem(entry: Any) -> str | None:
    """Returns what is wrong with one tensor's header entry, or None."""
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        return f"its header entry must have exactly {', '.join(sorted(ENTRY))}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"has dtype {dtype!r:.40}; accepted are {', '.join(DTYPE_BYTES)}"
    if not _are_whole(shape, least=0) or len(shape) > MAX_DIMENSIONS:
        return f"has shape {shape!r:.80}; accepted are up to {MAX_DIMENSIONS} sizes of at least 0"
    if math.prod(size or 1 for size in shape) >= MAX_ELEMENTS:
        return f"has shape {shape!r:.80}; the limit is {MAX_ELEMENTS} elements"
    if not _are_whole(offsets, least=0) or len(offsets) != 2:
        return f"has data_offsets {offsets!r:.80}; expected [begin, end]"
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        return f"has {end - begin} bytes; shape {shape} in {dtype} needs {expected}"
    return None


def _are_whole(numbers: object, *, least: int) -> bool:
    """True if this is a list of integers from `least` to 2**63 - 1."""
    return isinstance(numbers, list) and all(
        type(number) is int and least <= number < 1 << 63 for number in numbers
    )


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    """Returns the parsed JSON object. Raises AdapterInvalid, also for a repeated key, NaN or half
    of a surrogate pair.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is repeated")
        return made

    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant
        )
        _check_depth(parsed)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid.because(where, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise AdapterInvalid.because(where, "is not a JSON object")
    return parsed


def _check_depth(parsed: Any) -> None:
    """Raises ValueError for nesting that could overflow the stack when printed or compared."""
    level = [parsed]
    for _ in range(MAX_DEPTH + 1):
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [value for values in inner for value in values]
    if level:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _no_constant(name: str) -> None:
    """Raises ValueError for NaN and infinity, which Python parses although JSON has neither."""
    raise ValueError(f"{name} is not a JSON number")
