"""The first arguments of kernels that apply adapters: sites of resident adapters, and tiles.

The rows of a step, decoding or of prompts, are divided into tiles of up to TILE rows of one
adapter. Everything that differs between steps is in tensors on the device: the table of resident
adapters, whose address does not change when adapters do, and the tiles. So a captured launch can be
replayed with other adapters.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT
from adaplex.model.kernels.triton.dot import LEAST
from adaplex.model.weights.site_table import SITE_FIELDS

TILE = tl.constexpr(LEAST)
"""Rows of one adapter in one product."""
RANKS = tl.constexpr(LEAST)
"""Ranks, or rows of a weight, in one product."""
FIELDS = tl.constexpr(len(SITE_FIELDS))
ALIGNED = tl.constexpr(ALIGNMENT)


class SiteArguments(NamedTuple):
    """The first arguments of every kernel that applies adapters: where to find their sites."""

    table: Tensor
    """[slots, modules, SITE_FIELDS] int64: AdapterWeights.table of each resident adapter."""
    table_row: int
    """Stride of a slot."""
    module: int
    """Number of the module."""
    tiles: Tensor
    """[3, tiles] int64: slot, first row and number of rows of each tile; slot -1 to skip it."""


@triton.jit
def tile_rows(tiles):
    """tiles: pointer to int64 [3, tiles] -> rows [TILE] of this program's tile, and bool [TILE]
    whether each is in use.
    """
    tile, count = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, TILE)
    return tl.load(tiles + count + tile) + i, i < tl.load(tiles + 2 * count + tile)


@triton.jit
def elements(site, FIELD: tl.constexpr, x):
    """site: pointer to int64 [SITE_FIELDS]; x: pointer to elements -> the address in a field of the
    site, as a pointer to elements.
    """
    address = tl.load(site + FIELD).to(tl.pointer_type(x.dtype.element_ty))
    return tl.multiple_of(address, ALIGNED)


@triton.jit
def vector(site, FIELD: tl.constexpr, x, o, width, default):
    """site: pointer to int64 [SITE_FIELDS]; o int -> fp32 elements `o` of the vector [width] whose
    address is in a field of the site; `default` if the field is zero.
    """
    wanted = (o < width) & (tl.load(site + FIELD) != 0)
    return tl.load(elements(site, FIELD, x) + o, mask=wanted, other=default).to(tl.float32)
