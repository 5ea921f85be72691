"""Reading of single modules for the C decoder: linears, norms, activations.

Norms and activations are run on samples, since their names do not show what they compute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from adaplex.adapters.program.primitives import Activation
from adaplex.model.adapters.torch_rows import ACTIVATIONS
from adaplex.model.forward.decoder_shape import Linear, Norm, OtherShape
from adaplex.model.linear.native import NativeLinear
from adaplex.model.modules.hooks import AdaptedLinear
from adaplex.model.weights import site_table

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Names that norms give their epsilon."""
CLOSE = 1e-4
"""Largest difference of norms that counts as rounding, as a share of the sample's length."""
ROUNDING = 1e-5
"""Largest difference of activations that counts as rounding: GELU and its approximation by tanh
differ by 5e-4.
"""


def parts_of(module: nn.Module) -> set[str]:
    """Returns the names of the children that compute something."""
    idle = (nn.Dropout, nn.Identity)
    return {name for name, child in module.named_children() if not isinstance(child, idle)}


def first_found(
    parts: Set[str], alternatives: Iterable[tuple[str, ...]], role: str
) -> tuple[str, ...]:
    """Returns the first of the alternative names of a role that `parts` has. Raises OtherShape."""
    for names in alternatives:
        if parts >= {*names}:
            return names
    raise OtherShape(f"no {role} among {', '.join(sorted(parts))}")


def require_no_more(parts: Set[str], known: Set[str], owner: str) -> None:
    """Raises OtherShape for parts that are not known."""
    if extra := parts - known:
        raise OtherShape(f"{owner} with {', '.join(sorted(extra))}")


def read_linear(module: Any, outputs: int, inputs: int | None = None) -> Linear:
    """Returns a linear [outputs, inputs]; `inputs` None for any. Raises OtherShape for one of
    another size or without panels.
    """
    if not isinstance(module, AdaptedLinear) or not isinstance(module.backend, NativeLinear):
        raise OtherShape("a linear without panels")
    found = (module.backend.out_features, module.backend.in_features)
    if found != (outputs, found[1] if inputs is None else inputs):
        raise OtherShape(f"{module.name} [{found[0]}, {found[1]}], not [{outputs}, {inputs}]")
    return Linear(module.name, module.backend)


def read_norm(name: str, module: Any, features: int) -> Norm:
    """Returns an RMSNorm or a LayerNorm, whatever it adds to its weight. Raises OtherShape."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    epsilon = next((getattr(module, each) for each in EPSILONS if hasattr(module, each)), None)
    if weight is None or epsilon is None or tuple(weight.shape) != (features,):
        raise OtherShape(f"{name}: a norm of another kind")
    weight = weight.detach().float()
    bias = None if bias is None else bias.detach().float().contiguous()
    sizes = torch.tensor([[1.0], [float(epsilon) ** 0.5]])  # the epsilon shows in the second
    x = torch.linspace(-1, 2, features) * sizes
    found = copy.deepcopy(module).float().forward(x)  # without hooks
    for centered in (False, True):
        for offset in (0.0, 1.0):
            whole = (weight + offset).contiguous()
            norm = Norm(name, whole, bias, float(epsilon), centered, offset)
            if _close(_normed(norm, x), found):
                return norm
    raise OtherShape(f"{name}: {type(module).__name__} computes something else")


def read_activation(module: Any) -> int:
    """Returns the number of an activation in activations.h. Raises OtherShape."""
    x = torch.linspace(-4, 4, 321)
    found = module(x)
    for activation in Activation:
        if torch.allclose(ACTIVATIONS[activation](x), found, rtol=0, atol=ROUNDING):
            return site_table.ACTIVATIONS.index(activation)
    raise OtherShape(f"activation {type(module).__name__}")


def _normed(norm: Norm, x: Tensor) -> Tensor:
    """x [rows, features] -> its norm."""
    if norm.centered:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon) * norm.weight
    return y if norm.bias is None else y + norm.bias


def _close(a: Tensor, b: Tensor) -> bool:
    apart = torch.linalg.vector_norm(a - b)
    return bool(apart <= CLOSE * torch.linalg.vector_norm(b))
