"""SavedBase: a quantized base in one file, which is mapped at the next start.

A safetensors file in the cache, named by the SHA-256 of everything that its content depends on. It
has the tensors of every linear backend, every other parameter and buffer, and the findings of the
probe, so that the checkpoint is not read and nothing is quantized. A checksum of every tensor is
compared each time, so that a file that the disk changed is made anew. The file is written once and
renamed to its place; whoever cuts it short while a server maps it ends that server (SIGBUS).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor, nn

from adaplex.adapters.durable_files import sync
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.base.architecture import Probe
from adaplex.model.kv_cache import LayerShape
from adaplex.model.modules.hooks import AdaptedLinear

LAYOUT = 5
"""Version of the content. Raised when a backend stores a weight in another way, in Python or in C,
when other modules are sites, or when this file changes."""
ALIGNMENT = 64
"""Bytes, as torch aligns tensors. Products of fp32 may round in another way elsewhere."""
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Type -> its name in safetensors."""


class Unusable(Exception):
    """The content of the file is not what its name stands for."""


class SavedBase:
    """The file of one base, in a folder that processes share."""

    def __init__(self, folder: Path, parts: Mapping[str, object]) -> None:
        """`parts` is what the content depends on besides LAYOUT, in JSON's types."""
        self._key = json.dumps({"layout": LAYOUT, **parts}, sort_keys=True)
        self.path = folder / f"{_sha256(self._key)}.safetensors"

    def read(self) -> Contents | None:
        """Returns what is saved, None if nothing is. Raises Unusable, or OSError and
        SafetensorError for a file that cannot be read.
        """
        if not self.path.exists():
            return None
        file: Any = safe_open(self.path, "pt")
        metadata = file.metadata() or {}
        if metadata.get("key") != self._key:
            raise Unusable("it was made for another base or version")
        if metadata.get("digest") != _sha256(metadata.get("description", "")):
            raise Unusable("its description is damaged")
        return Contents(file, json.loads(metadata["description"]))

    def write(self, model: nn.Module, found: Probe) -> None:
        """Saves a built model, whole or not at all. Raises OSError, also while another process
        saves it, or KeyError for a tensor of a type that cannot be saved.
        """
        tensors: dict[str, Tensor] = {}
        kinds, ties = {}, {}
        for name, module in model.named_modules():
            if isinstance(module, AdaptedLinear):
                backend = module.backend
                parts = backend.tensors() | ({} if backend.bias is None else {"bias": backend.bias})
                kinds[name] = type(backend).__name__
                tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        first: dict[int, str] = {}
        for name, _, _, tensor in _state(model):
            tied = first.setdefault(id(tensor), name)
            if tied == name:
                tensors[name] = tensor.detach()
            else:
                ties[name] = tied
        sums = {name: _checksum(tensor.detach().cpu()) for name, tensor in tensors.items()}
        description = json.dumps({"kinds": kinds, "ties": ties, "sums": sums, **asdict(found)})
        metadata = {"key": self._key, "description": description, "digest": _sha256(description)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with FileLock(f"{partial}.lock", blocking=False):
            try:
                _write(partial, tensors, metadata)
                partial.chmod(0o644)  # the cache may be shared
                sync(partial)
                partial.rename(self.path)
                sync(self.path.parent)
            finally:
                partial.unlink(missing_ok=True)


class Contents:
    """An intact file. Tensors are mapped: what the system needs memory for, it drops and reads
    again.
    """

    def __init__(self, file: Any, description: Mapping[str, Any]) -> None:
        """Compares the checksum of every tensor, on all processors. Raises Unusable."""
        self._file = file
        self._sums: Mapping[str, int] = description["sums"]
        if damaged := self._damaged():
            raise Unusable(f"{damaged[0]} is not as it was saved: the disk or a program changed it")
        self._kinds: Mapping[str, str] = description["kinds"]
        self._ties: Mapping[str, str] = description["ties"]
        self._linears: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118  # safe_open cannot be iterated
            linear, slash, _ = name.partition("/")
            if slash:
                self._linears.setdefault(linear, []).append(name)
        self.found = Probe(
            [LayerShape(**shape) for shape in description["shapes"]],
            [BaseModule(**site) for site in description["sites"]],
        )

    def linear(self, name: str) -> tuple[str, dict[str, Tensor]]:
        """Returns the class name of a linear's backend, and its tensors with its bias. Raises
        KeyError.
        """
        parts = {each.partition("/")[2]: self._tensor(each) for each in self._linears[name]}
        return self._kinds[name], parts

    def fill(self, model: nn.Module) -> None:
        """Sets every parameter and buffer of the model. Raises SafetensorError for one that was not
        saved, Unusable for one of another shape.
        """
        filled: dict[str, Tensor] = {}
        for name, owner, attribute, empty in _state(model):
            source = self._ties.get(name, name)
            if source not in filled:
                tensor = self._tensor(source)
                if tensor.shape != empty.shape:
                    raise Unusable(
                        f"{name} has shape {tuple(tensor.shape)}, not {tuple(empty.shape)}"
                    )
                if isinstance(empty, nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=False)
                filled[source] = tensor
            setattr(owner, attribute, filled[source])

    def _damaged(self) -> list[str]:
        """Returns the tensors that differ from what was saved, sorted."""
        names = sorted(self._sums.keys() | set(self._file.keys()))

        def differs(name: str) -> bool:
            return _checksum(self._file.get_tensor(name)) != self._sums.get(name)

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            return [name for name, bad in zip(names, pool.map(differs, names), strict=True) if bad]

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _state(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yields (name, owner, attribute, tensor) of every parameter and buffer, also of those that no
    checkpoint holds, such as rotary frequencies; tied ones under each of their names.
    """
    for prefix, owner in list(model.named_modules()):
        for attribute, tensor in (
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        ):
            yield f"{prefix}.{attribute}".removeprefix("."), owner, attribute, tensor


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose tensors are aligned, up to the first one of an odd size.

    safetensors' own writer aligns to 8 bytes only. Raises OSError, or KeyError for a type that
    safetensors has no name for.
    """
    names = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of a tensor's type, shape and bytes."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data, zlib.crc32(f"{tensor.dtype}{[*tensor.shape]}".encode()))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
