"""A small base and LoRA checkpoints for it, and registries to store them in."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, Checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.registry.importer import Importer
from adaplex.adapters.registry.intake import Committed
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.sources.sources import Sources
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.catalog import Query
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.folder_content import ALIVE
from adaplex.adapters.storage.staging import FileSpec, Staging

UPLOAD = Origin(datetime(2026, 1, 1, tzinfo=UTC), actor="ada", source="upload")
HIDDEN, INNER = 8, 16
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
VALUE = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.layers.0.norm"
HEAD = "lm_head"


def make_base(name: str = "org/tiny-base", layers: int = 2, *, fingerprint: str = "") -> BaseSpec:
    """Returns a base whose q_proj and norm have a bias, and no other module."""
    modules = [BaseModule(HEAD, "linear", HIDDEN, 24, is_head=True)]
    for i in range(layers):
        layer = f"model.layers.{i}"
        modules += [
            BaseModule(f"{layer}.self_attn.q_proj", "linear", HIDDEN, HIDDEN, has_bias=True),
            BaseModule(f"{layer}.self_attn.v_proj", "linear", HIDDEN, HIDDEN // 2),
            BaseModule(f"{layer}.mlp.down_proj", "linear", INNER, HIDDEN),
            BaseModule(f"{layer}.norm", "norm", HIDDEN, HIDDEN, has_bias=True),
        ]
    biases = {m.name: torch.full([m.out_features], 0.5) for m in modules if m.has_bias}
    return BaseSpec(
        name, "base", "llama", {m.name: m for m in modules}, biases, fingerprint=fingerprint
    )


BASE = make_base()


def config(**fields: Any) -> dict[str, Any]:
    """Returns an adapter_config.json with these fields."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    } | fields


def pair(module: str, rank: int = 2, *, seed: int = 0, base: BaseSpec = BASE) -> dict[str, Tensor]:
    """Returns the two tensors of one module under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    spec = base.modules[module]
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, spec.in_features, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(
            spec.out_features, rank, generator=generator
        ),
    }


def tensors(*suffixes: str, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Returns pairs for the modules of BASE with one of the suffixes, by default q and v."""
    made: dict[str, Tensor] = {}
    for name in BASE.modules:
        if name.endswith(suffixes or ("q_proj", "v_proj")):
            made |= pair(name, rank, seed=seed)
    return made


def checkpoint(weights: Mapping[str, Tensor] | None = None, **fields: Any) -> Checkpoint:
    """Returns a checkpoint as read_checkpoint does."""
    return Checkpoint(config(**fields), tensors() if weights is None else weights)


def files(
    fields: Mapping[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None
) -> dict[str, bytes]:
    """Returns the two files of an adapter directory."""
    return {
        CONFIG: json.dumps(config() if fields is None else fields).encode(),
        WEIGHTS: save(dict(tensors() if weights is None else weights)),
    }


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Returns a safetensors file with any header and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(directory: Path, contents: Mapping[str, bytes]) -> Path:
    """Writes an adapter directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return directory


def specs(contents: Mapping[str, bytes]) -> list[FileSpec]:
    """Returns what an upload of these files announces."""
    return [
        FileSpec(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    ]


def stage(registry: AdapterRegistry, contents: Mapping[str, bytes], chunk: int = 100) -> Staging:
    """Uploads the files in small chunks, without committing them."""
    staging = registry.intake.stage(specs(contents))
    for index, content in enumerate(contents.values()):
        for offset in range(0, len(content), chunk):
            staging.write(index, offset, content[offset : offset + chunk])
    return staging


def push(
    registry: AdapterRegistry,
    name: str,
    contents: Mapping[str, bytes] | None = None,
    *,
    seed: int = 0,
    replace: bool = False,
) -> Committed:
    """Uploads and commits an adapter; each seed gives different content."""
    contents = contents or files(weights=tensors(seed=seed))
    with stage(registry, contents) as staging:
        return registry.intake.commit(staging, name, replace=replace, origin=UPLOAD)


def make_registry(root: Path, base: BaseSpec = BASE, **options: Any) -> AdapterRegistry:
    """Returns a registry for fp32."""
    return AdapterRegistry.local(root, base, element_bytes=4, **options)


def make_sources(*roots: Path, **options: Any) -> Sources:
    """Returns sources of local folders; `options` add others."""
    return Sources(**{"roots": roots, "limits": AdapterLimits()} | options)


def make_importer(registry: AdapterRegistry, roots: Sequence[Path], **options: Any) -> Importer:
    """Returns an importer from local folders; `options` add other sources."""
    return Importer(registry, registry.intake._contents, make_sources(*roots, **options))


def digest_of(registry: AdapterRegistry, selector: str, key: str = "") -> str:
    """Returns the digest that a request resolves a selector to."""
    with registry.resolve(selector, routing_key=key) as lease:
        return lease.record.digest


def records(registry: AdapterRegistry, **query: Any) -> list[AdapterRecord]:
    """Returns the newest version of every name, ordered by name."""
    found = registry.names.query(Query(limit=1_000_000, **query))
    return [registry.names.latest(entry) for entry in found]


def staged(root: Path) -> list[str]:
    """Returns the staging folders of unfinished uploads, of any process."""
    return [path.name for path in (root / "staging").glob("*/*") if path.name != ALIVE]


def objects(root: Path) -> set[str]:
    """Returns the digests of stored objects."""
    return {f"sha256:{path.name}" for path in (root / "objects").iterdir()}


def object_folder(root: Path, digest: str) -> Path:
    """Returns the folder of an object in a store."""
    return root / "objects" / digest.removeprefix("sha256:")
