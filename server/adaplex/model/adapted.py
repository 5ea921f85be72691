"""Layers of the base that adapters can touch. They know primitives, not families."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaplex.model.kernels import reference
from adaplex.model.linear import LinearBackend
from adaplex.model.step import Segment, StepContext


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
        segments = self._step.head_segments if self.is_head else self._step.segments
        rows = x.reshape(-1, x.shape[-1])
        y = self._adapted(rows, segments) if segments else self.backend(rows)
        return y.view(*x.shape[:-1], self.backend.out_features)

    def _adapted(self, x: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """x [rows, in] -> [rows, out]. One merged adapter for all rows skips the base."""
        dense = segments[0].merged.get(self.name)
        if dense is not None and segments[0].stop - segments[0].start == x.shape[0]:
            return dense(x)
        y = self.backend(x)
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            if (dense := segment.merged.get(self.name)) is not None:
                y[rows] = dense(x[rows])
            elif (site := segment.sites.get(self.name)) is not None:
                if site.a is not None and site.b is not None:
                    reference.add_low_rank(y[rows], x[rows], site.a, site.b)
                if site.bias is not None:
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
        for segment in self._step.segments:
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
