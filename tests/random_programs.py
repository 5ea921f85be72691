"""Random adapters for the base of a rig, made of primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.program.primitives import Bottleneck, LowRank, Reads, ReplacedRows
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from rig import ModelRig


def made(rig: ModelRig, rank: int, seed: int) -> AdapterProgram:
    """Returns a random LoRA on every linear of the decoder layers."""
    random = torch.Generator().manual_seed(seed)
    modules = []
    for name, module in sorted(rig.base.spec.modules.items()):
        if module.kind == "linear" and "layers" in name:
            a = torch.randn(rank, module.in_features, generator=random) * 0.2
            b = torch.randn(module.out_features, rank, generator=random) * 0.2
            modules.append(ModuleProgram(name, LowRank(a, b)))
    return AdapterProgram(f"sha256:{rank}-{seed}", "lora", tuple(modules))


def anything(rig: ModelRig, seed: int) -> AdapterProgram:
    """Returns a random adapter with a primitive at each module, in turn of all kinds."""
    random = torch.Generator().manual_seed(seed)

    def rand(*shape: int, size: float = 0.2, middle: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=random) * size + middle

    modules = []
    for i, (name, module) in enumerate(sorted(rig.base.spec.modules.items())):
        width, out = module.in_features, module.out_features
        rows = ReplacedRows((3 + seed, 30, 200), rand(3, width))
        scale = rand(out, middle=1.0)
        match module.kind, (i + seed) % 3:
            case "linear", _ if module.is_head:
                change = ModuleProgram(name, rows=rows, output_scale=scale)
            case "linear", 0:
                pair = LowRank(rand(seed + 2, width), rand(out, seed + 2))
                change = ModuleProgram(name, pair, rand(out), output_scale=scale)
            case "linear", 1:
                change = ModuleProgram(name, input_scale=rand(width, middle=1.0))
            case "linear", 2:
                change = ModuleProgram(name, bias=rand(out), weight=rand(out, width, size=0.1))
            case "norm", 0:
                change = ModuleProgram(name, weight=rand(out, middle=0.7))
            case "norm", _:
                change = ModuleProgram(name, bias=rand(out))
            case "embedding", _:
                rows = ReplacedRows((3 + seed, 30, 200), rand(3, out))
                pair = LowRank(rand(4, width), rand(out, 4), lookup=True)
                change = ModuleProgram(name, pair, rows=rows)
            case "experts", _:
                rank = 2 * module.experts
                change = ModuleProgram(name, LowRank(rand(rank, width), rand(out, rank)))
            case "block", _ if module.joins:
                shape = Bottleneck(rand(9, width), rand(out, 9), rand(9), reads=[*Reads][seed % 4])
                change = ModuleProgram(name, bottleneck=shape)
            case _:
                continue
        modules.append(change)
    return AdapterProgram(f"sha256:anything-{seed}", "x", tuple(modules))
