"""MergedWeights: base plus delta, dense, in the compute dtype; never re-quantized, never in
place. How many exist is the engine's policy; here they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from adaplex.adapters.program import AdapterProgram
from adaplex.model.kernels.low_rank import SiteWeights
from adaplex.model.linear import DenseLinear, LinearBackend


@dataclass(frozen=True)
class MergedWeights:
    """What merged rows of one adapter run instead of, and beside, the base."""

    linears: dict[str, LinearBackend] = field(default_factory=dict)
    sites: dict[str, SiteWeights] = field(default_factory=dict)
    """Primitives that cannot be merged into a weight: biases of norms."""


def merge(
    program: AdapterProgram,
    backends: Mapping[str, LinearBackend],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MergedWeights:
    """Builds the merged weights from the base's effective (dequantized) weights, in fp32."""
    merged = MergedWeights()
    for module in program.modules:
        backend = backends.get(module.module)
        if backend is None:
            assert module.low_rank is None
            assert module.bias is not None
            merged.sites[module.module] = SiteWeights(bias=module.bias.to(device, dtype))
            continue
        weight = backend.dequantize()
        if module.low_rank is not None:
            pair = module.low_rank
            weight = weight + pair.b.to(device).float() @ pair.a.to(device).float()
        bias = backend.bias
        if module.bias is not None:
            shift = module.bias.to(device).float()
            bias = (shift if bias is None else bias.float() + shift).to(dtype)
        merged.linears[module.module] = DenseLinear(weight.to(dtype), bias)
    return merged


def merged_bytes(
    program: AdapterProgram, backends: Mapping[str, LinearBackend], dtype: torch.dtype
) -> int:
    """Bytes that `merge` would take."""
    shapes = (backends[m.module] for m in program.modules if m.module in backends)
    return sum(b.out_features * b.in_features for b in shapes) * dtype.itemsize
