"""A base of a few small modules, and LoRA checkpoints for it made by hand."""

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
from adaplex.adapters.sources import Sources
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
    """q_proj and norm have a bias, the other modules have none."""
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
    """An adapter_config.json; `fields` win."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    } | fields


def pair(module: str, rank: int = 2, *, seed: int = 0, base: BaseSpec = BASE) -> dict[str, Tensor]:
    """The two tensors of one module, under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    spec = base.modules[module]
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, spec.in_features, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(
            spec.out_features, rank, generator=generator
        ),
    }


def tensors(*suffixes: str, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Pairs for every module of BASE that ends in one of the suffixes, q and v by default."""
    made: dict[str, Tensor] = {}
    for name in BASE.modules:
        if name.endswith(suffixes or ("q_proj", "v_proj")):
            made |= pair(name, rank, seed=seed)
    return made


def checkpoint(weights: Mapping[str, Tensor] | None = None, **fields: Any) -> Checkpoint:
    """As read_checkpoint would return it."""
    return Checkpoint(config(**fields), tensors() if weights is None else weights)


def files(
    fields: Mapping[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None
) -> dict[str, bytes]:
    """The two files of an adapter directory."""
    return {
        CONFIG: json.dumps(config() if fields is None else fields).encode(),
        WEIGHTS: save(dict(tensors() if weights is None else weights)),
    }


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, and a header length that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(directory: Path, contents: Mapping[str, bytes]) -> Path:
    """Writes an adapter directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return directory


def specs(contents: Mapping[str, bytes]) -> list[FileSpec]:
    """What an upload of these files announces."""
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
    """Uploads and commits; each seed is other content."""
    contents = contents or files(weights=tensors(seed=seed))
    with stage(registry, contents) as staging:
        return registry.intake.commit(staging, name, replace=replace, origin=UPLOAD)


def make_registry(root: Path, base: BaseSpec = BASE, **options: Any) -> AdapterRegistry:
    """A registry for fp32."""
    return AdapterRegistry.local(root, base, element_bytes=4, **options)


def make_importer(registry: AdapterRegistry, roots: Sequence[Path], **options: Any) -> Importer:
    """Imports from folders; `options` add other sources."""
    sources = Sources(roots=roots, limits=AdapterLimits(), **options)
    return Importer(registry, registry.intake._contents, sources)


def records(registry: AdapterRegistry, **query: Any) -> list[AdapterRecord]:
    """The newest version of every name, by name."""
    found = registry.names.query(Query(limit=1_000_000, **query))
    return [registry.names.latest(entry) for entry in found]


def staged(root: Path) -> list[str]:
    """Names of uploads under way, of any process."""
    return [path.name for path in (root / "staging").glob("*/*") if path.name != ALIVE]


def objects(root: Path) -> set[str]:
    """Digests of what is stored."""
    return {f"sha256:{path.name}" for path in (root / "objects").iterdir()}
