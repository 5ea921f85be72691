"""Products of oneDNN, which give a row the same bits in every number of rows above one."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def multiplies(weight: Tensor) -> bool:
    """weight [out, in] -> True if oneDNN can multiply by its type on its device."""
    on_cpu = weight.device.type == "cpu"
    return on_cpu and torch.backends.mkldnn.is_available() and _probe(weight.dtype)


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """weight [out, in] -> the same in oneDNN's layout for products of `rows` rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in], weight [out, in], prepacked or not -> x W' + bias [rows, out]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@cache
def _probe(dtype: torch.dtype) -> bool:
    """True if this processor and this build of torch multiply weights of a type: tried once, with a
    tiny weight. oneDNN refuses bf16 on processors without AVX512BW and AVX-NE-CONVERT.
    """
    x = torch.ones(4, 8, dtype=dtype)
    try:
        multiply(x, prepacked(x, 4))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("%s weights are multiplied without oneDNN: %s", dtype, reason)
        return False
    return True
