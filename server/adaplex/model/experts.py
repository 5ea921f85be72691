"""Row-invariant mixture-of-experts, behind transformers' experts interface.

Transformers' own loop multiplies however many rows an expert got at once, and BLAS rounds a
product of one fp32 row differently from a product of many; here every product is row-invariant.
Source of the interface: `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adaplex.model.kernels.reference import linear_rows

IMPLEMENTATION = "adaplex_rows"


def experts_forward(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden [rows, in], top_k_index and top_k_weights [rows, k] -> [rows, in].

    `module` holds gate_up_proj [experts, 2 * mid, in] and down_proj [experts, in, mid], the other
    way round when `is_transposed`, with optional biases.
    """
    out = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        rows, place = torch.where(top_k_index == expert)
        mid = _project(module, "gate_up_proj", expert, hidden[rows])
        mid = module._apply_gate(mid)
        mid = _project(module, "down_proj", expert, mid)
        out.index_add_(0, rows, (mid * top_k_weights[rows, place, None]).to(out.dtype))
    return out


def _project(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """x [rows, in] times the weight of one expert, plus its bias when there is one."""
    weight = getattr(module, name)[expert]
    y = linear_rows(x, weight.T if getattr(module, "is_transposed", False) else weight)
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[expert]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
