"""Small adapters for the fake model, as files and as the messages of an upload."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adaplex.v1 import adapters_pb2
from server.fake_model import BASE, FEATURES


def adapter_files(seed: int = 0, **config: Any) -> dict[str, bytes]:
    """Returns the files of a small LoRA checkpoint for BASE, as PEFT writes it."""
    rank = 2
    generator = torch.Generator().manual_seed(seed)
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    tensors = {}
    for module in BASE.modules:
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, FEATURES, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(FEATURES, rank, generator=generator)
    return {
        "adapter_config.json": json.dumps(described | config).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def upload_messages(
    files: dict[str, bytes],
    *,
    name: str = "a",
    policy: int = 0,
    chunk: int = 100,
    message: Any = adapters_pb2.UploadAdapterRequest,
) -> list[Any]:
    """Returns the messages of an upload."""
    metadata = adapters_pb2.AdapterUpload(name=name, policy=policy)  # type: ignore[arg-type]
    for file, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        metadata.files.add(name=file, size_bytes=len(data), sha256=digest)
    messages = [message(metadata=metadata)]
    for index, data in enumerate(files.values()):
        for offset in range(0, len(data), chunk):
            part = adapters_pb2.AdapterChunk(
                file_index=index, offset=offset, data=data[offset : offset + chunk]
            )
            messages.append(message(chunk=part))
    return messages


def write_adapter(folder: Path, seed: int = 0) -> Path:
    """Writes a small LoRA checkpoint to a new folder."""
    folder.mkdir(parents=True)
    for name, data in adapter_files(seed).items():
        (folder / name).write_bytes(data)
    return folder
