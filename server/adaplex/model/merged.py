"""MergedWeights: base plus delta, dense, in the compute dtype; never re-quantized, never in
place. How many exist is the engine's policy; here they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program import AdapterProgram
from adaplex.model.kernels.low_rank import SiteWeights
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.native.structs import SITE_FIELDS
from adaplex.model.linear import LinearBackend
from adaplex.model.native_linear import NativeLinear, dense_linear


@dataclass(frozen=True)
class MergedWeights:
    """What merged rows of one adapter run instead of, and beside, the base."""

    linears: dict[str, LinearBackend] = field(default_factory=dict)
    sites: dict[str, SiteWeights] = field(default_factory=dict)
    """Primitives that cannot be merged into a weight: biases of norms."""
    shifts: dict[str, Tensor] = field(default_factory=dict)
    """Biases [out] that the adapter adds at linears, beside that of the base."""

    def table(self, modules: Mapping[str, int]) -> NDArray[np.int64]:
        """[modules, SITE_FIELDS] as in AdapterWeights, of weights in panels."""
        table = np.zeros((len(modules), len(SITE_FIELDS)), dtype=np.int64)
        dense, bias = SITE_FIELDS.index("dense"), SITE_FIELDS.index("bias")
        for name, linear in self.linears.items():
            assert isinstance(linear, NativeLinear)
            table[modules[name], dense] = linear.panels.data_ptr()
        for name, shift in self.shifts.items():
            table[modules[name], bias] = shift.data_ptr()
        return table


def merge(
    program: AdapterProgram,
    backends: Mapping[str, LinearBackend],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: NativeKernels | None = None,
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
            merged.shifts[module.module] = module.bias.to(device, dtype).contiguous()
        merged.linears[module.module] = dense_linear(kernels, weight.to(dtype), bias)
    return merged


def merged_bytes(
    program: AdapterProgram, backends: Mapping[str, LinearBackend], dtype: torch.dtype
) -> int:
    """Bytes that `merge` would take."""
    shapes = (backends[m.module] for m in program.modules if m.module in backends)
    return sum(b.out_features * b.in_features for b in shapes) * dtype.itemsize
