"""FoldedWeights: base plus adapter, for merged mode.

A folded linear is dense in the compute dtype unless the base's own format holds the delta without
loss; nothing is re-quantized, and the base is not written to. The engine decides which adapters are
folded.
"""

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
from adaplex.model.linear.backend import DenseLinearMaker, LinearBackend
from adaplex.model.linear.native import NativeLinear
from adaplex.model.linear.native_int4 import NativeInt4Linear
from adaplex.model.weights.adapter_weights import AdapterWeights
from adaplex.model.weights.site_table import SiteField


@dataclass(frozen=True)
class FoldedWeights:
    """An adapter in merged mode: linears in place of the base's, and the rest of the adapter."""

    linears: dict[str, LinearBackend]
    """Linears with the adapter folded in, which replace the base's."""
    shifts: dict[str, Tensor]
    """Biases [out] to add to those of the base, by linear."""
    rest: AdapterWeights
    """The adapter's changes at modules that are no linears."""

    def table(self, modules: Mapping[str, int]) -> NDArray[np.int64]:
        """Returns the table [modules, SiteField] for the C decoder: the panels, or the zeros, of
        every folded linear. Requires a native backend at each.
        """
        table = self.rest.table.copy()
        for name, linear in self.linears.items():
            assert isinstance(linear, NativeLinear)
            if isinstance(linear, NativeInt4Linear) and linear.zeros is not None:
                table[modules[name], SiteField.ZEROS] = linear.zeros.data_ptr()
            else:
                table[modules[name], SiteField.DENSE] = linear.panels.data_ptr()
        for name, shift in self.shifts.items():
            table[modules[name], SiteField.BIAS] = shift.data_ptr()
        return table


def fold(
    program: AdapterProgram,
    backends: Mapping[str, LinearBackend],
    *,
    packer: Packer,
    dense: DenseLinearMaker,
    device: torch.device,
) -> FoldedWeights:
    """Folds a program into the base's effective (dequantized) weights, in fp32."""
    linears: dict[str, LinearBackend] = {}
    shifts: dict[str, Tensor] = {}
    for module in program.modules:
        backend = backends.get(module.module)
        if backend is None:
            continue
        bias = backend.bias
        shift = _bias_shift(module, bias, device)
        if shift is not None:
            bias = (shift if bias is None else bias.float() + shift).to(packer.dtype)
            shifts[module.module] = shift.to(packer.dtype).contiguous()
        delta = _lone_delta(module)
        folded = None if delta is None else backend.folded(delta, bias)
        if folded is None:
            weight = _folded_weight(module, backend.dequantize()).to(packer.dtype)
            folded = dense(weight, bias)
        linears[module.module] = folded
    packed = packer.pack(_without_linears(program, backends))
    return FoldedWeights(linears, shifts, packed.weights(packed.flat.to(device)))


def folded_bytes(
    program: AdapterProgram, backends: Mapping[str, LinearBackend], dtype: torch.dtype
) -> int:
    """Returns the bytes of what `fold` makes."""
    linears = (
        _linear_bytes(module, backends[module.module], dtype)
        for module in program.modules
        if module.module in backends
    )
    return sum(linears) + _without_linears(program, backends).packed_bytes(dtype.itemsize)


def folded_shares(
    program: AdapterProgram, backends: Mapping[str, LinearBackend]
) -> tuple[float, float]:
    """Returns (dense, kept), as in FoldedShare: the fractions of the elements of `backends` that
    are dense after folding, and that have a weight of their own in the base's format.
    """
    elements = {True: 0, False: 0}
    for module in program.modules:
        if (backend := backends.get(module.module)) is not None:
            delta = _lone_delta(module)
            dense = delta is None or backend.folded_bytes(delta) is None
            elements[dense] += backend.elements
    whole = sum(backend.elements for backend in backends.values())
    return elements[True] / whole, elements[False] / whole


def _linear_bytes(module: ModuleProgram, backend: LinearBackend, dtype: torch.dtype) -> int:
    """Returns the bytes of one folded linear."""
    delta = _lone_delta(module)
    kept = None if delta is None else backend.folded_bytes(delta)
    return backend.elements * dtype.itemsize if kept is None else kept


def _lone_delta(module: ModuleProgram) -> LowRank | None:
    """Returns the low-rank delta of a linear if nothing else changes its weight."""
    others = (
        module.transform,
        module.weight,
        module.rows,
        module.output_scale,
        module.input_scale,
    )
    return module.low_rank if all(other is None for other in others) else None


def _without_linears(
    program: AdapterProgram, backends: Mapping[str, LinearBackend]
) -> AdapterProgram:
    """Returns the part of a program that is not at linears."""
    modules = tuple(m for m in program.modules if m.module not in backends)
    return replace(program, modules=modules)


def _folded_weight(module: ModuleProgram, weight: Tensor) -> Tensor:
    """weight fp32 [out, in] -> fp32 [out, in], with all that the module's primitives change."""
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


def _bias_shift(module: ModuleProgram, base: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns fp32 [out], by which the bias of the linear changes; None if it does not."""
    shift = None if module.bias is None else module.bias.to(device).float()
    if module.output_scale is not None and base is not None:
        scaled = (module.output_scale.to(device).float() - 1) * base.float()
        shift = scaled if shift is None else scaled + shift
    return shift
