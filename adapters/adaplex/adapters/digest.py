"""Identity: the SHA-256 of what changes an adapter's answers, however its files are laid out."""

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
"""Fields whose lists are no sets."""


def content_digest(checkpoint: Checkpoint, semantic_fields: Iterable[str]) -> str:
    """`sha256:<hex>` over the named config fields and every tensor.

    Each part is tagged and preceded by its length, so that no two contents give one stream. A
    field that is absent and one that is set to nothing are the same.
    """
    total = hashlib.sha256(b"adaplex-adapter-v1")

    def take(tag: bytes, part: bytes | memoryview) -> None:
        total.update(tag + len(part).to_bytes(8, "little"))
        total.update(part)

    for field in sorted(semantic_fields):
        value = checkpoint.config.get(field)
        if value is not False and value not in (None, [], {}, "none"):  # 0 is a layer
            if isinstance(value, list) and field not in ORDERED:
                value = sorted(value, key=str)
            elif isinstance(value, float) and value.is_integer():
                value = int(value)
            take(b"F", field.encode())
            take(b"V", json.dumps(value, sort_keys=False).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name].contiguous()
        take(b"N", name.encode())
        take(b"D", f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        take(b"T", tensor.view(-1).view(torch.uint8).numpy().data)
    return PREFIX + total.hexdigest()
