"""AdapterHub's files as its library wrote them, and changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import Bottleneck
from adaplex.adapters.program.program import AdapterProgram

FIXTURES = Path(__file__).parent.parent / "adapterhub" / "fixtures"
LIMITS = AdapterLimits()
HIDDEN, HALF, LAYERS = 64, 32, 2


def make_base(kind: str = "llama", **fields: Any) -> BaseSpec:
    """The shapes of the fixtures' models; every weight is 1."""
    modules: list[BaseModule] = []
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        outputs = {"q": HIDDEN, "k": HALF, "v": HALF}
        modules += [
            *(
                BaseModule(f"{place}.self_attn.{n}_proj", "linear", HIDDEN, outputs[n])
                for n in "qkv"
            ),
            *(
                BaseModule(f"{place}.mlp.{n}_proj", "linear", HIDDEN, HIDDEN)
                for n in ("up", "down")
            ),
            BaseModule(
                f"{place}.self_attn", "block", HIDDEN, HIDDEN, layer=layer, part="attention"
            ),
            BaseModule(f"{place}.mlp", "block", HIDDEN, HIDDEN, layer=layer, part="mlp"),
        ]
    by_name = {module.name: module for module in modules}
    shape: dict[str, Any] = {"kv_shapes": ((2, 16, 16),) * LAYERS, "rotary": torch.ones(8)}

    def ones(name: str) -> Tensor:
        return torch.ones(by_name[name].out_features, by_name[name].in_features)

    return BaseSpec("org/tiny", "digest", kind, by_name, weight=ones, **(shape | fields))


BASE = make_base()


def read(name: str, architecture: str = "llama") -> Checkpoint:
    return read_checkpoint(FIXTURES / architecture / name, LIMITS)


def lower(found: Checkpoint, base: BaseSpec = BASE) -> AdapterProgram:
    return formats.lower(found, base, LIMITS)


def changed(name: str, *, drop: str = "", **fields: Any) -> Checkpoint:
    """A fixture with changes to the method's config, or without a field of it."""
    found = read(name)
    config = {**found.config["config"], **fields}
    config.pop(drop, None)
    return Checkpoint({**found.config, "config": config}, found.tensors)


def outer(name: str, /, **fields: Any) -> Checkpoint:
    found = read(name)
    return Checkpoint({**found.config, **fields}, found.tensors)


def retensored(name: str, changes: dict[str, Tensor | None]) -> Checkpoint:
    """A fixture with tensors added, replaced, or taken out."""
    found = read(name)
    tensors = {**found.tensors, **{k: v for k, v in changes.items() if v is not None}}
    kept = {k: v for k, v in tensors.items() if changes.get(k, v) is not None}
    return Checkpoint(found.config, kept)


def bottleneck(program: AdapterProgram, module: str) -> Bottleneck:
    found = {m.module: m.bottleneck for m in program.modules}[module]
    assert found is not None
    return found
