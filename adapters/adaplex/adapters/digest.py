"""Content digest: SHA-256 of the fields and tensors that change an adapter's answers.

The layout of the files does not enter the digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

import torch

from adaplex.adapters.checkpoint import Checkpoint

PREFIX = "sha256:"
PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
ORDERED = frozenset(["alora_invocation_tokens", "token_indices", "trainable_token_indices"])
"""Config fields whose lists have an order that counts; other lists are hashed as sets."""


def content_digest(checkpoint: Checkpoint, semantic_fields: Iterable[str]) -> str:
    """Returns `sha256:<hex>` over the named config fields and every tensor.

    Each item is preceded by a tag and its length, so that two different contents never hash the
    same bytes. An absent field and an unset one count as equal.
    """
    total = hashlib.sha256(b"adaplex-adapter-v1")

    def update(tag: bytes, item: bytes | memoryview) -> None:
        total.update(tag + len(item).to_bytes(8, "little"))
        total.update(item)

    for field in sorted(semantic_fields):
        value = checkpoint.config.get(field)
        if value is not False and value not in (None, [], {}, "none"):  # 0 may be a layer index
            if isinstance(value, list) and field not in ORDERED:
                value = sorted(value, key=str)
            elif isinstance(value, float) and value.is_integer():
                value = int(value)
            update(b"F", field.encode())
            update(b"V", json.dumps(value, sort_keys=False).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name].contiguous()
        update(b"N", name.encode())
        update(b"D", f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        update(b"T", tensor.view(-1).view(torch.uint8).numpy().data)
    return PREFIX + total.hexdigest()
