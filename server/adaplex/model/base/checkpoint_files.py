"""Files of a model folder: which are the base's, and checks that need neither torch nor
transformers, before both load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaplex.model.errors import ModelSourceError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
"""A file of an adapter. It may lie beside a base, and is never part of it."""
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
)
"""Files of which a tokenizer has at least one."""
LFS_POINTER = b"version https://git-lfs"
LENGTH_BYTES = 8
"""Bytes of the length of a safetensors header, which begins the file."""


def check_model_folder(model: str, directory: Path) -> None:
    """Raises ModelSourceError, with a line for each reason, if no base can be read from the folder
    that `model` names. Reads the config and the first bytes of the weights only.
    """
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file():
        raise ModelSourceError(
            model,
            f"{directory} holds an adapter ({ADAPTER_CONFIG}) and no base ({CONFIG}); serve its "
            "base model and upload it with adaplex adapters push",
        )
    reasons = [*_config(directory / CONFIG), *_weights(directory), *_tokenizer(directory)]
    if reasons:
        raise ModelSourceError(model, "; ".join(reasons))


def weight_files(directory: Path) -> list[Path]:
    """Returns the files of the base's weights in a checked folder, sorted: the single file if there
    is one, as transformers prefers it, otherwise the shards of the index.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    return [directory / name for name in sorted(set(_weight_map(directory).values()))]


def left_out(directory: Path) -> list[str]:
    """Returns the names of files beside the base that could be weights and are not read."""
    used = {path.name for path in weight_files(directory)}
    others = {path.name for path in directory.glob("*.safetensors")} - used
    adapter = {ADAPTER_CONFIG} if (directory / ADAPTER_CONFIG).is_file() else set()
    index = {INDEX} if WEIGHTS in used and (directory / INDEX).is_file() else set()
    return sorted(others | adapter | index)


def _config(path: Path) -> Iterator[str]:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield f"{path.parent} has no {CONFIG}"
        return
    except (OSError, ValueError) as error:
        yield f"{CONFIG} cannot be read: {error}"
        return
    if not isinstance(config, dict):
        yield f"{CONFIG} is a {type(config).__name__}, not a mapping"
        return
    if (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
        yield (
            "its weights are quantized by bitsandbytes; use the original checkpoint, which "
            "--quantization nf4 or int8 quantizes"
        )


def _weights(directory: Path) -> Iterator[str]:
    if (directory / WEIGHTS).is_file():
        yield from _safetensors(directory / WEIGHTS)
        return
    if not (directory / INDEX).is_file():
        found = ", ".join(sorted(path.name for path in directory.glob("*.safetensors")))
        yield (
            f"{directory} has no {WEIGHTS} and no {INDEX}, but {found}"
            if found
            else f"{directory} has no *.safetensors (pickles are not read)"
        )
        return
    try:
        files = _weight_map(directory)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        yield f"{INDEX} cannot be read: {error!r}"
        return
    shards = sorted(set(files.values()))
    if missing := [name for name in shards if not (directory / name).is_file()]:
        yield f"{directory} lacks {', '.join(missing)}, which {INDEX} lists; copy all shards"
        return
    reasons = [reason for name in shards for reason in _safetensors(directory / name)]
    yield from reasons or _index(directory, files)


def _weight_map(directory: Path) -> dict[str, str]:
    """Returns tensor -> shard of the index. Raises ValueError and others for a damaged one."""
    listed = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name, file in listed.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(f"it places {name} in {file!r}, which is no *.safetensors beside it")
    return dict(listed)


def _index(directory: Path, listed: Mapping[str, str]) -> Iterator[str]:
    """Yields where the index and the shards differ, which may then be of different models."""
    remedy = "the index and the shards are of different versions; copy all of them again"
    held: dict[str, str] = {}
    for file in sorted(set(listed.values())):
        for name in _header(directory / file):
            if name in held or listed.get(name) != file:
                place = held.get(name) or listed.get(name)
                where = f"in {place}" if place else "nowhere"
                yield f"{file} has {name}, which {INDEX} places {where}: {remedy}"
                return
            held[name] = file
    for name in sorted(listed.keys() - held.keys()):
        yield f"{listed[name]} lacks {name}, which {INDEX} places there: {remedy}"
        return


def _end_of_data(path: Path) -> int:
    """Returns the bytes after the header that the tensors need."""
    return max((int(each["data_offsets"][1]) for each in _header(path).values()), default=0)


def _header(path: Path) -> dict[str, Any]:
    """Returns the entries of a safetensors file by tensor. Raises OSError and ValueError."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(
            file.read(int.from_bytes(file.read(LENGTH_BYTES), "little"))
        )
    header.pop("__metadata__", None)
    return header


def _safetensors(path: Path) -> Iterator[str]:
    """Yields what is wrong with the beginning of a file of weights."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(len(LFS_POINTER))
    except OSError as error:
        yield f"{path.name} cannot be read: {error.strerror}"
        return
    if begin == LFS_POINTER:
        yield f"{path.name} is a Git LFS pointer, not weights; run git lfs pull in its repository"
        return
    header = int.from_bytes(begin[:LENGTH_BYTES], "little")
    if begin[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or LENGTH_BYTES + header > size:
        yield f"{path.name} is no safetensors file, or is cut off: it has {size} bytes"
        return
    try:
        end = _end_of_data(path) + LENGTH_BYTES + header
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        yield f"{path.name}: its header cannot be read ({error!r:.80}); copy the file again"
        return
    if end != size:
        yield f"{path.name} is cut off, or too long: it has {size} bytes, its header says {end}"


def _tokenizer(directory: Path) -> Iterator[str]:
    if not any((directory / name).is_file() for name in TOKENIZERS):
        yield f"{directory} has no tokenizer ({TOKENIZERS[0]} or another); copy its base model's"
