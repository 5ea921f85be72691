"""FoldedWeights: base plus adapter, dense in the compute dtype unless the base's own form takes the
delta without loss; never re-quantized, never in place. How many exist is the engine's policy; here
they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.model.adapters.packing import Packer
from adaplex.model.kernels.native.structs import SITE_FIELDS
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.native import NativeLinear, dense_linear
from adaplex.model.linear.native_int4 import NativeInt4Linear
from adaplex.model.weights.adapter_weights import AdapterWeights


@dataclass(frozen=True)
class FoldedWeights:
    """What merged rows of one adapter run instead of, and beside, the base."""

    linears: dict[str, LinearBackend]
    shifts: dict[str, Tensor]
    """Biases [out] at linears, beside that of the base."""
    rest: AdapterWeights
    """What cannot be merged into the weight of a linear."""

    def table(self, modules: Mapping[str, int]) -> NDArray[np.int64]:
        """[modules, SITE_FIELDS] as in AdapterWeights, of weights in panels, or of zeros for those
        of the base.
        """
        table = self.rest.table.copy()
        dense, zeros, bias = (SITE_FIELDS.index(field) for field in ("dense", "zeros", "bias"))
        for name, linear in self.linears.items():
            assert isinstance(linear, NativeLinear)
            if isinstance(linear, NativeInt4Linear) and linear.zeros is not None:
                table[modules[name], zeros] = linear.zeros.data_ptr()
            else:
                table[modules[name], dense] = linear.panels.data_ptr()
        for name, shift in self.shifts.items():
            table[modules[name], bias] = shift.data_ptr()
        return table


def merge(
    program: AdapterProgram,
    backends: Mapping[str, LinearBackend],
    *,
    packer: Packer,
    device: torch.device,
) -> FoldedWeights:
    """Builds the merged weights from the base's effective (dequantized) weights, in fp32."""
    linears: dict[str, LinearBackend] = {}
    shifts: dict[str, Tensor] = {}
    for module in program.modules:
        backend = backends.get(module.module)
        if backend is None:
            continue
        bias = backend.bias
        shift = _shift(module, bias, device)
        if shift is not None:
            bias = (shift if bias is None else bias.float() + shift).to(packer.dtype)
            shifts[module.module] = shift.to(packer.dtype).contiguous()
        delta = _delta(module)
        merged = None if delta is None else backend.merged(delta, bias)
        if merged is None:
            weight = _merged(module, backend.dequantize()).to(packer.dtype)
            merged = dense_linear(packer.kernels, weight, bias)
        linears[module.module] = merged
    packed = packer.pack(_rest(program, backends))
    return FoldedWeights(linears, shifts, packed.weights(packed.flat.to(device)))


def merged_bytes(
    program: AdapterProgram, backends: Mapping[str, LinearBackend], dtype: torch.dtype
) -> int:
    """Bytes that `merge` would take."""
    sizes = (_size(m, backends[m.module], dtype) for m in program.modules if m.module in backends)
    return sum(sizes) + _rest(program, backends).packed_bytes(dtype.itemsize)


def merged_parts(
    program: AdapterProgram, backends: Mapping[str, LinearBackend]
) -> tuple[float, float]:
    """Which parts of all these weights are dense once merged, and have one of their own kind."""
    parts = {True: 0, False: 0}
    for module in program.modules:
        if (backend := backends.get(module.module)) is not None:
            delta = _delta(module)
            dense = delta is None or backend.merged_bytes(delta) is None
            parts[dense] += backend.out_features * backend.in_features
    whole = sum(backend.out_features * backend.in_features for backend in backends.values())
    return parts[True] / whole, parts[False] / whole


def _size(module: ModuleProgram, backend: LinearBackend, dtype: torch.dtype) -> int:
    """Bytes of one merged linear."""
    delta = _delta(module)
    kept = None if delta is None else backend.merged_bytes(delta)
    return backend.out_features * backend.in_features * dtype.itemsize if kept is None else kept


def _delta(module: ModuleProgram) -> LowRank | None:
    """The delta of a linear whose weight nothing else changes."""
    others = (
        *(module.transform, module.weight, module.rows),
        *(module.output_scale, module.input_scale),
    )
    return module.low_rank if all(other is None for other in others) else None


def _rest(program: AdapterProgram, backends: Mapping[str, LinearBackend]) -> AdapterProgram:
    """What is not at a linear."""
    modules = tuple(m for m in program.modules if m.module not in backends)
    return replace(program, modules=modules)


def _merged(module: ModuleProgram, weight: Tensor) -> Tensor:
    """fp32 [out, in]: the weight that does what the primitives do to a linear's product."""
    if module.transform is not None:
        weight = module.transform(weight)
    if module.weight is not None:
        weight = module.weight.to(weight)
    if module.rows is not None:
        weight = weight.clone()
        weight[list(module.rows.ids)] = module.rows.weight.to(weight)
    if module.output_scale is not None:
        weight = weight * module.output_scale.to(weight)[:, None]
    if module.low_rank is not None:
        weight = weight + module.low_rank.b.to(weight) @ module.low_rank.a.to(weight)
    if module.input_scale is not None:
        weight = weight * module.input_scale.to(weight)
    return weight


def _shift(module: ModuleProgram, base: Tensor | None, device: torch.device) -> Tensor | None:
    """fp32 [out]: how the bias of the linear changes, None if it does not."""
    shift = None if module.bias is None else module.bias.to(device).float()
    if module.output_scale is not None and base is not None:
        scaled = (module.output_scale.to(device).float() - 1) * base.float()
        shift = scaled if shift is None else scaled + shift
    return shift
