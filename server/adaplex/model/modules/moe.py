"""Row-invariant mixture-of-experts, behind transformers' experts interface.

Transformers' own loop multiplies however many rows an expert got at once, and BLAS rounds a
product of one fp32 row differently from a product of many; here every product is row-invariant,
those of routers too, which are no linears and call `torch.nn.functional.linear` themselves.
Source of the interface: `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adaplex.model.linear.products import DenseProduct
from adaplex.model.step.step_context import StepContext

IMPLEMENTATION = "adaplex_rows"
PRODUCT_ATTRIBUTE = "adaplex_product"
"""Attribute of experts: the DenseProduct that they multiply by."""
NAMES_ATTRIBUTE, STEP_ATTRIBUTE = "adaplex_names", "adaplex_step"
"""Attributes of adapted experts: the full name of each parameter, and the step's context."""


class RowInvariantLinear(TorchFunctionMode):
    """Computes `torch.nn.functional.linear` by a DenseProduct in its context."""

    def __init__(self, product: DenseProduct) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See TorchFunctionMode."""
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """input [..., in], weight [out, in], bias [out] or None -> [..., out]."""
        rows = self._product(input.reshape(-1, input.shape[-1]), weight, bias)
        return rows.view(*input.shape[:-1], -1)


def install_experts(model: nn.Module, product: DenseProduct) -> None:
    """Routes the fused mixture-of-experts layers of a model through `experts_forward`, and the
    products of its routers through `product`.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.forward = _with_product(module.forward, product)
        if not getattr(module, "has_gate", False):
            continue
        object.__setattr__(module, PRODUCT_ATTRIBUTE, product)
        if not getattr(module, "has_post_expert_norm", False):
            config = module.config
            config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]


def _with_product(forward: Callable[..., Any], product: DenseProduct) -> Callable[..., Any]:
    """Returns the forward of a module with its products replaced."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        with RowInvariantLinear(product):
            return forward(*args, **kwargs)

    return replaced


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
