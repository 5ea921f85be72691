"""Layers of the base that adapters can touch. They know primitives, not families."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaplex.model.linear import LinearBackend
from adaplex.model.step import AdapterRows, StepContext


class AdaptedLinear(nn.Module):
    """A linear of the base, plus whatever the adapters of the step do to their rows."""

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
        """[..., in] -> [..., out]; rows are the leading dimensions, flattened."""
        adapters = self._step.head_rows if self.is_head else self._step.rows
        rows = x.reshape(-1, x.shape[-1])
        y = self._adapted(rows, adapters) if adapters.any else self.backend(rows)
        return y.view(*x.shape[:-1], self.backend.out_features)

    def _adapted(self, x: Tensor, adapters: AdapterRows) -> Tensor:
        """x [rows, in] -> [rows, out]. One merged adapter for all rows skips the base."""
        if adapters.segments and adapters.segments[0].covers(x.shape[0]):
            dense = adapters.segments[0].merged.get(self.name)
            if dense is not None:
                return dense(x)
        y = self.backend(x)
        adapters.add_low_rank(self.name, x, y)
        for segment in adapters.segments:
            rows = slice(segment.start, segment.stop)
            if (dense := segment.merged.get(self.name)) is not None:
                y[rows] = dense(x[rows])
            elif (site := segment.sites.get(self.name)) is not None and site.bias is not None:
                y[rows] += site.bias
        return y


class AdaptedNorm(nn.Module):
    """A norm of the base whose bias adapters may shift."""

    def __init__(self, name: str, norm: nn.Module, step: StepContext) -> None:
        super().__init__()
        self.name = name
        self.norm = norm
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]."""
        y: Tensor = self.norm(x)
        for segment in self._step.rows.segments:
            site = segment.sites.get(self.name)
            if site is not None and site.bias is not None:
                y.view(-1, y.shape[-1])[segment.start : segment.stop] += site.bias
        return y


def oriented_weight(module: nn.Module) -> Tensor:
    """[out, in] weight of a linear, whichever way round the module stores it."""
    weight = module.get_parameter("weight").detach()
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def base_bias(module: nn.Module) -> Tensor | None:
    """[out] bias of a module, None without one."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
