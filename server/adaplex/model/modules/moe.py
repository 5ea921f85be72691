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

from adaplex.model.linear.products import DenseProduct
from adaplex.model.step.step_context import StepContext

IMPLEMENTATION = "adaplex_rows"
PRODUCT_ATTRIBUTE = "adaplex_product"
"""Attribute of experts: the DenseProduct that they multiply by."""
NAMES_ATTRIBUTE, STEP_ATTRIBUTE = "adaplex_names", "adaplex_step"
"""Attributes of adapted experts: the full name of each parameter, and the step's context."""


def install_experts(model: nn.Module, product: DenseProduct) -> None:
    """Routes the fused mixture-of-experts layers of a model through `experts_forward`."""
    for module in model.modules():
        if not getattr(module, "has_gate", False):
            continue
        object.__setattr__(module, PRODUCT_ATTRIBUTE, product)
        if not getattr(module, "has_post_expert_norm", False):
            config = module.config
            config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]


def adapt_experts(module: nn.Module, name: str, parameter: str, step: StepContext) -> None:
    """Applies the adapters of a step to what a fused parameter of the experts `name` gives."""
    names = getattr(module, NAMES_ATTRIBUTE, {})
    object.__setattr__(module, NAMES_ATTRIBUTE, {**names, parameter: f"{name}.{parameter}"})
    object.__setattr__(module, STEP_ATTRIBUTE, step)


def experts_forward(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden [rows, in], top_k_index and top_k_weights [rows, k] -> [rows, in].

    `module` has gate_up_proj [experts, 2 * mid, in] and down_proj [experts, in, mid], the other
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
    """x [chosen, in], the rows `rows` [chosen] of the step -> [chosen, out], by the weight and bias
    of one expert and what adapters add to these rows.
    """
    weight, biases = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    if getattr(module, "is_transposed", False):
        weight = weight.T
    bias = None if biases is None else biases[expert]
    product: DenseProduct = getattr(module, PRODUCT_ATTRIBUTE)
    y = product(x, weight, bias)
    step: StepContext | None = getattr(module, STEP_ATTRIBUTE, None)
    if step is not None and step.rows.any:
        step.rows.expert(getattr(module, NAMES_ATTRIBUTE)[name], expert, rows, x, y)
    return y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
