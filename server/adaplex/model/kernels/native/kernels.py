"""NativeKernels: Python interface of the C kernels for one element type."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from adaplex.model import huge_pages
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.kernels.native import structs
from adaplex.model.kernels.native.instruction_sets import InstructionSet, chosen_set
from adaplex.model.kernels.native.library import ERRORS, NO_MEMORY, load_library
from adaplex.model.progress import Progress, silent
from adaplex.model.weights.nf4 import NF4_BLOCK

ELEMENTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
CODE_LINE = 64
"""Bytes of a line: the 4-bit codes of eight inputs of a panel."""


class NativeKernels:
    """The library's functions for one compute dtype. The process has one team of threads."""

    def __init__(
        self,
        dtype: torch.dtype,
        cache: Path,
        instructions: InstructionSet | None = None,
        progress: Progress = silent,
        patience: float = math.inf,
        *,
        int8_activations: bool = False,
    ) -> None:
        """Loads the library, after building it if it is not in `cache`. Raises BuildFailed, also
        if that takes more than `patience` seconds.
        """
        self.instructions = instructions or chosen_set()
        self.dtype = dtype
        self.int8_activations = int8_activations
        """True if 4-bit weights are multiplied by activations of 8 bits; see integers.h."""
        self.per_unit = 4 // dtype.itemsize
        self._library = load_library(cache, self.instructions, progress, patience)
        self.nf4_units = ctypes.c_float.in_dll(self._library, "nf4_units").value
        """Integers that make 1 where nf4 is multiplied by activations of 8 bits."""
        element = ELEMENTS[dtype]
        self._forward = getattr(self._library, f"{element}_forward")
        self._linear = getattr(self._library, f"{element}_linear")
        self.low_rank = getattr(self._library, f"{element}_low_rank")
        """(x, stride, in, y, stride, out, spans, sites, count) -> return code, with x [rows, in], y
        [rows, out], spans [count, 2] int64 and sites [count] as addresses; see standalone.h."""

    def use_threads(self, count: int) -> int:
        """Resizes the team to `count` threads; returns its size, which may be smaller."""
        return int(self._library.team_resize(count))

    def forward(self, model: structs.Model, step: structs.Step) -> None:
        """Runs one step of a decoder; the arrays that the structs point to must stay alive. Raises
        MemoryError, and ValueError for an invalid step.
        """
        _check(self._forward(ctypes.byref(model), ctypes.byref(step)))

    def linear(self, weight: structs.Weight, x: Tensor) -> Tensor:
        """x [rows, in] of the compute dtype -> x W' + bias [rows, out]. Raises MemoryError."""
        assert x.dtype == self.dtype
        assert x.shape[1] == weight.in_features
        assert x.stride(1) == 1
        y = x.new_empty(x.shape[0], weight.out_features)
        rows = (x.data_ptr(), x.stride(0), x.shape[0])
        _check(self._linear(ctypes.byref(weight), *rows, y.data_ptr(), y.stride(0)))
        return y

    def packs_dense(self, in_features: int) -> bool:
        """True if a dense weight [out, in_features] can be packed."""
        return in_features % self.per_unit == 0

    def packs_nf4(self, in_features: int) -> bool:
        """True if an nf4 weight [out, in_features] can be packed."""
        return self.dtype == torch.bfloat16 and in_features % NF4_BLOCK == 0

    def pack_dense(self, weight: Tensor) -> Tensor:
        """weight [out, in] -> panels [out / 16, in / per_unit, 16, per_unit], rounded up."""
        rows, columns = weight.shape
        units = columns // self.per_unit
        panels = huge_pages.empty(
            -(-rows // PANEL_COLUMNS), units, PANEL_COLUMNS, self.per_unit, dtype=self.dtype
        )
        weight = weight.to(self.dtype).contiguous()
        source = (weight.data_ptr(), rows, columns, self.per_unit)
        self._library.pack_dense(*source, panels.data_ptr())
        return panels

    def pack_nf4(
        self, codes: Tensor, absmax: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """codes and absmax of a weight of `shape` [out, in], as bitsandbytes quantizes it -> panels
        as of `pack_codes`, and scales [out / 16, in / NF4_BLOCK, 16]; rounded up.
        """
        rows, columns = shape
        scales = absmax.float().view(rows, columns // NF4_BLOCK)
        return self.pack_codes(codes.view(rows, columns // 2)), self.pack_groups(scales)

    def pack_codes(self, codes: Tensor) -> Tensor:
        """codes [out, in / 2], the first of two in the high half of a byte -> panels
        [out / 16, in / 8, CODE_LINE] of lines of eight inputs, rounded up; the order within a
        line is that of the instruction set.
        """
        rows, columns = codes.shape[0], codes.shape[1] * 2
        panels = huge_pages.empty(
            -(-rows // PANEL_COLUMNS), columns // 8, CODE_LINE, dtype=torch.uint8
        )
        codes = codes.contiguous()
        self._library.pack_codes(codes.data_ptr(), rows, columns, panels.data_ptr())
        return panels

    def unpack_codes(self, panels: Tensor, rows: int) -> Tensor:
        """panels of `pack_codes` -> uint8 [rows, in / 2]: the codes of two inputs, the first in the
        low half.
        """
        columns = panels.shape[1] * 8
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        self._library.unpack_codes(panels.data_ptr(), rows, columns, codes.data_ptr())
        return codes

    def pack_groups(self, values: Tensor) -> Tensor:
        """values [out, groups, ..] of four bytes a group -> [out / 16, groups, 16, ..],
        rounded up.
        """
        rows, groups, *rest = values.shape
        packed = huge_pages.empty(
            -(-rows // PANEL_COLUMNS), groups, PANEL_COLUMNS, *rest, dtype=values.dtype
        )
        values = values.contiguous()
        assert values.nbytes == 4 * rows * groups
        self._library.pack_groups(values.data_ptr(), rows, groups, packed.data_ptr())
        return packed

    def pack_low_rank(self, b: Tensor) -> Tensor:
        """b [rank, out] of a low-rank delta -> its panels [rank * out]; see low_rank.h."""
        packed = torch.empty(b.numel(), dtype=self.dtype)
        b = b.to(self.dtype).contiguous()
        source = (b.data_ptr(), b.shape[0], b.shape[1], self.per_unit)
        self._library.pack_low_rank(*source, packed.data_ptr())
        return packed


def _check(code: int) -> None:
    """Raises the error of a return code."""
    if code == NO_MEMORY:
        raise MemoryError(ERRORS[code])
    if code:
        raise ValueError(f"the kernels refuse the step: {ERRORS[code]}")
