"""Modules of the base to which the adapters of a step apply: AdaptedLinear, and hooks elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.modules import moe
from adaplex.model.step.step_context import StepContext


class AdaptedLinear(nn.Module):
    """A linear of the base, and what the adapters of the step do to their rows."""

    def __init__(
        self, name: str, backend: LinearBackend, step: StepContext, *, is_head: bool
    ) -> None:
        super().__init__()
        self.name = name
        self.backend = backend
        self.is_head = is_head
        self._step = step

    @property
    def weight(self) -> Tensor:
        """The effective weight, fp32 [out, in]; some models read their linears' weights."""
        return self.backend.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; rows are the leading dimensions, flattened."""
        adapters = self._step.head_rows if self.is_head else self._step.rows
        rows = x.reshape(-1, x.shape[-1])
        y = adapters.linear(self.name, self.backend, rows) if adapters.any else self.backend(rows)
        return y.view(*x.shape[:-1], self.backend.out_features)


def install_hooks(module: nn.Module, site: BaseModule, step: StepContext) -> None:
    """Applies the adapters of a step to the output of a module that is no linear."""
    match site.kind:
        case "norm":
            module.register_forward_hook(_norm_hook(site.name, step))
        case "embedding":
            module.register_forward_hook(_embedding_hook(site.name, step))
        case "block" if site.joins:
            module.register_forward_hook(_block_hook(site.name, step), with_kwargs=True)
        case "experts":
            owner, _, parameter = site.name.rpartition(".")
            moe.adapt_experts(module, owner, parameter, step)
        case _:
            pass


def _norm_hook(name: str, step: StepContext) -> Any:
    """Returns a hook for a norm of the residual stream [batch, tokens, hidden], which bottlenecks
    of the block behind it may read, or of the heads of [batch, tokens, heads, features].
    """

    def hook(norm: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not step.rows.any:
            return
        if args[0].dim() == 4:
            step.rows.norm(name, norm, args[0].flatten(0, 1), y.view(-1, *y.shape[2:]))
        else:
            step.residual = args[0]
            step.rows.norm(name, norm, _rows(args[0]), _rows(y))

    return hook


def _embedding_hook(name: str, step: StepContext) -> Any:
    def hook(embedding: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if step.rows.any:
            step.rows.embedding(name, embedding, args[0].reshape(-1), _rows(y))

    return hook


def _block_hook(name: str, step: StepContext) -> Any:
    """Returns a hook for a block. Attention returns a tuple whose first item joins the residual
    stream, and gets its input by name.
    """

    def hook(
        _block: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Any
    ) -> None:
        if step.rows.any and step.residual is not None:
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else named["hidden_states"]
            step.rows.block(name, _rows(x), _rows(step.residual), _rows(y))

    return hook


def _rows(x: Tensor) -> Tensor:
    """x [..., features] -> [rows, features], a view of the same memory."""
    return x.view(-1, x.shape[-1])


def oriented_weight(module: nn.Module) -> Tensor:
    """Returns the weight of a linear as [out, in], whichever way round the module stores it."""
    weight = module.get_parameter("weight").detach()
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def base_bias(module: nn.Module) -> Tensor | None:
    """Returns the bias [out] of a module, None without one."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
