"""Checks of a model folder's files that need neither torch nor transformers, before both load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaplex.model.errors import ModelSourceError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
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
    reasons = [*_config(directory / CONFIG), *_weights(directory), *_tokenizer(directory)]
    if reasons:
        raise ModelSourceError(model, "; ".join(reasons))


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
    present = {path.name for path in directory.glob("*.safetensors")}
    index = directory / INDEX
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            yield f"{INDEX} cannot be read: {error!r}"
            listed = set()
        if missing := sorted(map(str, listed - present)):
            yield f"{directory} lacks {', '.join(missing)}, which {INDEX} lists; copy all shards"
    elif not present:
        yield f"{directory} has no *.safetensors (pickles are not read)"
    for name in sorted(present):
        yield from _safetensors(directory / name)


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


def _tokenizer(directory: Path) -> Iterator[str]:
    if not any((directory / name).is_file() for name in TOKENIZERS):
        yield f"{directory} has no tokenizer ({TOKENIZERS[0]} or another); copy its base model's"
