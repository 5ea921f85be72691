"""TorchRows: what adapters do to their rows, in torch, one run of rows after the other.

The reference for the kernels that do it for all rows at once, and what serves where there are none.
Every product is row-invariant (see kernels.reference).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaplex.adapters.program.primitives import Activation, Reads
from adaplex.model.kernels.reference import linear_rows
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.weights.adapter_weights import AddLowRank, SiteWeights

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.RELU: F.relu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: F.leaky_relu,
}

VECTOR = 64
"""Elements: a multiple of what any processor computes at once."""


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) whose adapter does more than add low-rank deltas to linears.

    `merged` maps a linear to the dense weight that replaces it, `sites` a module to what is done
    there; `virtual` has the rows of virtual tokens: (row, which of them).
    """

    start: int
    stop: int
    sites: Mapping[str, SiteWeights]
    merged: Mapping[str, LinearBackend] = field(default_factory=dict)
    virtual: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)

    def covers(self, rows: int) -> bool:
        """Whether it has all rows of a step."""
        return (self.start, self.stop) == (0, rows)


def _nothing(_module: str, _x: Tensor, _y: Tensor) -> None:
    """No row has a low-rank delta."""


@dataclass(frozen=True)
class TorchRows:
    """See AdapterRows. `add_low_rank` adds the deltas of all rows at a linear."""

    segments: Sequence[Segment]
    add_low_rank: AddLowRank = _nothing
    any: bool = True

    def linear(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """See AdapterRows."""
        here = self._at(name)
        x = _scaled(x, here)
        y = self.product(name, backend, x)
        for rows, site in here:
            if site.weight is not None:
                y[rows] = linear_rows(x[rows], site.weight[: backend.out_features])
                if backend.bias is not None:
                    y[rows] += backend.bias
            if site.rows is not None:
                replaced = linear_rows(x[rows], site.rows)
                if backend.bias is not None:
                    replaced = replaced + backend.bias[site.row_ids]
                y[rows, site.row_ids] = replaced
            if site.output_scale is not None:
                y[rows] *= site.output_scale
        self.add_low_rank(name, x, y)
        for rows, site in here:
            if site.bias is not None:
                y[rows] += site.bias
        return y

    def product(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """See Product: of merged weights in the rows that have some. One merged adapter for all
        rows skips the base.
        """
        if self.segments and self.segments[0].covers(x.shape[0]):
            dense = self.segments[0].merged.get(name)
            if dense is not None:
                return dense(x)
        y = backend(x)
        for segment in self.segments:
            if (dense := segment.merged.get(name)) is not None:
                y[segment.rows] = dense(x[segment.rows])
        return y

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        for rows, site in self._at(name):
            if site.weight is not None:
                y[rows] = with_weight(norm, site.weight).forward(x[rows])
            if site.bias is not None:
                y[rows] += site.bias

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """See AdapterRows. Tables are scaled as the embedding scales its own."""
        scale = table_scale(embedding, y)
        factor = 1.0 if scale is None else scale
        for rows, site in self._at(name):
            if site.weight is not None:
                y[rows] = F.embedding(ids[rows], site.weight) * factor
            if site.rows is not None:
                wanted = site.row_ids.to(ids.device)
                place = torch.searchsorted(wanted, ids[rows]).clamp(max=len(wanted) - 1)
                found = wanted[place] == ids[rows]
                y[rows][found] = site.rows[place[found]] * factor
            if site.a is not None and site.b is not None:
                y[rows] += linear_rows(site.a[ids[rows]], site.b.T) * factor
        for segment in self.segments:
            for row, index in segment.virtual:
                tokens = segment.sites[name].virtual
                assert tokens is not None
                y[row] = tokens[index]

    def block(self, name: str, x: Tensor, residual: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        for rows, site in self._at(name):
            if site.a is None or site.b is None:
                continue
            read = {
                Reads.OUTPUT: lambda at: y[at],
                Reads.SUM: lambda at: residual[at] + y[at],
                Reads.INPUT: lambda at: x[at],
                Reads.RESIDUAL: lambda at: residual[at],
            }[site.reads](rows)
            middle = linear_rows(read, site.a)
            if site.inner is not None:
                middle = middle + site.inner
            y[rows] += linear_rows(_activated(middle, site.activation), site.b.T)
            if site.bias is not None:
                y[rows] += site.bias

    def expert(self, name: str, expert: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        for segment in self.segments:
            site = segment.sites.get(name)
            if site is None or site.a is None or site.b is None:
                continue
            ranks = slice(expert * site.expert_rank, (expert + 1) * site.expert_rank)
            mine = (rows >= segment.start) & (rows < segment.stop)
            if bool(mine.any()):
                y[mine] += linear_rows(linear_rows(x[mine], site.a[ranks]), site.b[ranks].T)

    def _at(self, name: str) -> list[tuple[slice, SiteWeights]]:
        return [(s.rows, s.sites[name]) for s in self.segments if name in s.sites]


def with_weight(norm: nn.Module, weight: Tensor) -> nn.Module:
    """The norm with another weight; to be asked by `forward`, since its hooks are shared."""
    other = copy.copy(norm)
    other._parameters = {n: p for n, p in norm._parameters.items() if n != "weight"}
    object.__setattr__(other, "weight", weight)  # no parameter: `torch.vmap` has it too
    return other


def table_scale(embedding: nn.Module, y: Tensor) -> Tensor | None:
    """What an embedding that made y multiplies its table by, [] in y's type; None where it does
    not. A number becomes a tensor on y's device without a copy from the host.
    """
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return None
    return scale.to(y) if isinstance(scale, Tensor) else y.new_full((), scale)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    """x [rows, width]. In whole vectors: torch computes the elements left over by other code, which
    rounds differently.
    """
    width = x.shape[1]
    return ACTIVATIONS[activation](F.pad(x, (0, -width % VECTOR)))[:, :width]


def _scaled(x: Tensor, here: Sequence[tuple[slice, SiteWeights]]) -> Tensor:
    """x, or a copy of it in which rows are scaled."""
    scales = [(rows, s.input_scale) for rows, s in here if s.input_scale is not None]
    if scales:
        x = x.clone()
        for rows, scale in scales:
            x[rows] *= scale
    return x
