"""Int8Head: a copy of the output layer in 8 bits, by which the C kernels find likeliest tokens.

The copy only shows which tokens may be the likeliest: the layer itself decides between them. See
kernels/native/int8_head.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adaplex.model import huge_pages
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.weights.panel_codes import unpack_dense

LARGEST_CODE = 127
LINE_INPUTS = 4
"""Inputs of a line of 64 bytes."""
CHUNK_PANELS = 256
"""Panels that are quantized at a time, to bound the memory that fp32 copies use."""
SHORTEST = 1e-10
"""Norm of the longest row below which denormals would count."""
SMALLEST_SCALE = 1e-30
"""Scale up to which a row has no codes, since the inverse of a smaller one may overflow."""
LIFT = 1 + 1e-4
"""Factor that covers the rounding of norms."""


@dataclass(frozen=True)
class Int8Head:
    """A weight [out, in] in 8-bit codes, symmetric, with a scale a row, and bounds of its errors.

    `panels` int8 [out / 16, in / 4, 2, 16, 2] and fp32 `scales` [out / 16, 16] are rounded up.
    `errors` [out / 16, 16] bounds the norm of a row's difference from its codes times their scale,
    `longest` the norm of every row and of its codes times their scale.
    """

    panels: Tensor
    scales: Tensor
    errors: Tensor
    longest: float

    @classmethod
    def of(cls, dense: Tensor, rows: int) -> Int8Head | None:
        """Quantizes `rows` rows of a weight in dense panels [out / 16, units, 16, per_unit]; None
        for a weight with elements that are not finite, or with none but tiny ones.
        """
        inputs = dense.shape[1] * dense.shape[3]
        lines = -(-inputs // LINE_INPUTS)
        panels = huge_pages.empty(
            dense.shape[0], lines, 2, PANEL_COLUMNS, LINE_INPUTS // 2, dtype=torch.int8
        )
        shape = (dense.shape[0], PANEL_COLUMNS)
        scales = huge_pages.empty(*shape, dtype=torch.float32)
        errors = huge_pages.empty(*shape, dtype=torch.float32)
        norms = []
        for start in range(0, dense.shape[0], CHUNK_PANELS):
            chosen = slice(start, start + CHUNK_PANELS)
            weight = unpack_dense(dense[chosen], rows - start * PANEL_COLUMNS).float()
            weight = functional.pad(weight, (0, 0, 0, -len(weight) % PANEL_COLUMNS))
            scale = weight.abs().amax(1) / LARGEST_CODE
            inverse = torch.where(scale > SMALLEST_SCALE, 1 / scale, 0.0)
            codes = weight.mul(inverse[:, None]).round_()
            effective = codes * scale[:, None]
            norms += [_norms(weight).amax(), _norms(effective).amax()]
            panels[chosen] = _packed(codes, lines)
            scales[chosen] = scale.view(-1, PANEL_COLUMNS)
            errors[chosen] = _norms(effective.sub_(weight)).mul_(LIFT).view(-1, PANEL_COLUMNS)
        longest = float(torch.stack(norms).amax())
        if not (math.isfinite(longest) and longest > SHORTEST):
            return None
        return cls(panels, scales, errors, longest * LIFT)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return int(self.panels.nbytes + self.scales.nbytes + self.errors.nbytes)


def _norms(weight: Tensor) -> Tensor:
    """weight [rows, in] -> norm of each row."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms


def _packed(codes: Tensor, lines: int) -> Tensor:
    """codes [rows, in] -> [rows / 16, lines, 2, 16, 2], int8; zero beyond the inputs."""
    padded = functional.pad(codes, (0, lines * LINE_INPUTS - codes.shape[1]))
    units = padded.to(torch.int8).view(-1, PANEL_COLUMNS, lines, 2, LINE_INPUTS // 2)
    return units.permute(0, 2, 3, 1, 4)
