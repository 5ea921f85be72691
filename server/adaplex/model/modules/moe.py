"""Row-invariant mixture-of-experts, behind transformers' experts interface.

Transformers' own loop multiplies however many rows an expert got at once, and BLAS rounds a
product of one fp32 row differently from a product of many; here every product is row-invariant.
Source of the interface: `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adaplex.model.linear.backend import dense_product
from adaplex.model.step.step_context import StepContext

IMPLEMENTATION = "adaplex_rows"
NAMES, STEP = "adaplex_names", "adaplex_step"
"""Attributes of adapted experts: the full name of each parameter, and the step's context."""


def adapt(module: nn.Module, name: str, parameter: str, step: StepContext) -> None:
    """Lets adapters change what a fused parameter of the experts `name` gives."""
    names = getattr(module, NAMES, {})
    object.__setattr__(module, NAMES, {**names, parameter: f"{name}.{parameter}"})
    object.__setattr__(module, STEP, step)


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
        mid = _project(module, "gate_up_proj", expert, rows, hidden[rows])
        mid = module._apply_gate(mid)
        mid = _project(module, "down_proj", expert, rows, mid)
        out.index_add_(0, rows, (mid * top_k_weights[rows, place, None]).to(out.dtype))
    return out


def _project(module: Any, name: str, expert: int, rows: Tensor, x: Tensor) -> Tensor:
    """x [chosen, in] times the weight of one expert, plus its bias when there is one, and what
    adapters add to these rows.
    """
    weight, biases = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    if getattr(module, "is_transposed", False):
        weight = weight.T
    bias = None if biases is None else biases[expert]
    y = dense_product(x.device)(x, weight, bias)
    step: StepContext | None = getattr(module, STEP, None)
    if step is not None and step.rows.any:
        step.rows.expert(getattr(module, NAMES)[name], expert, rows, x, y)
    return y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
