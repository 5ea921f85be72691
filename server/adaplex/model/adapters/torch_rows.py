"""TorchRows: what adapters do to their rows, in torch, one run of rows after the other.

It is the reference for the kernels that do it for all rows at once, and serves on devices without
such kernels. Every product is row-invariant (see kernels.reference).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaplex.adapters.program.primitives import Activation, Reads
from adaplex.model.kernels.low_rank import AddLowRank
from adaplex.model.kernels.reference import linear_rows
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.weights.adapter_weights import SiteWeights

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
"""Elements: a multiple of every processor's vector length."""


@dataclass(frozen=True)
class TorchRun:
    """Rows [start, stop) of an adapter that does more than add low-rank deltas to linears."""

    start: int
    stop: int
    sites: Mapping[str, SiteWeights]
    """The adapter's changes, by module."""
    folded: Mapping[str, LinearBackend] = field(default_factory=dict)
    """Folded linears, which replace the base's, by module."""
    virtual: tuple[tuple[int, int], ...] = ()
    """(row, virtual token) for each row of a virtual token."""

    @property
    def rows(self) -> slice:
        """The rows, as a slice."""
        return slice(self.start, self.stop)

    def covers(self, rows: int) -> bool:
        """True if the run has all rows of a step."""
        return (self.start, self.stop) == (0, rows)


def _no_delta(_module: str, _x: Tensor, _y: Tensor) -> None:
    """AddLowRank of a step without low-rank deltas."""


@dataclass(frozen=True)
class TorchRows:
    """AdapterRows in torch."""

    runs: Sequence[TorchRun]
    add_low_rank: AddLowRank = _no_delta
    """Adds the low-rank deltas of all rows at a linear."""
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
        """x [rows, in] -> [rows, out]: by folded linears in the rows that have one, by the base in
        the others. If one folded linear has all rows, the base is not multiplied by.
        """
        if self.runs and self.runs[0].covers(x.shape[0]):
            folded = self.runs[0].folded.get(name)
            if folded is not None:
                return folded(x)
        y = backend(x)
        for run in self.runs:
            if (folded := run.folded.get(name)) is not None:
                y[run.rows] = folded(x[run.rows])
        return y

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        for rows, site in self._at(name):
            if site.weight is not None:
                y[rows] = with_weight(norm, site.weight).forward(x[rows])
            if site.bias is not None:
                y[rows] += site.bias

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """See AdapterRows. An adapter's tables are scaled as the embedding scales its own."""
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
        for run in self.runs:
            for row, token in run.virtual:
                embeddings = run.sites[name].virtual
                assert embeddings is not None
                y[row] = embeddings[token]

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
        for run in self.runs:
            site = run.sites.get(name)
            if site is None or site.a is None or site.b is None:
                continue
            ranks = slice(expert * site.expert_rank, (expert + 1) * site.expert_rank)
            mine = (rows >= run.start) & (rows < run.stop)
            if bool(mine.any()):
                y[mine] += linear_rows(linear_rows(x[mine], site.a[ranks]), site.b[ranks].T)

    def _at(self, name: str) -> list[tuple[slice, SiteWeights]]:
        """Returns rows and site of each run that has a site at a module."""
        return [(run.rows, run.sites[name]) for run in self.runs if name in run.sites]


def with_weight(norm: nn.Module, weight: Tensor) -> nn.Module:
    """Returns the norm with another weight. Call its `forward`: it shares the hooks of the norm."""
    other = copy.copy(norm)
    other._parameters = {n: p for n, p in norm._parameters.items() if n != "weight"}
    object.__setattr__(other, "weight", weight)  # no parameter, so that `torch.vmap` may pass it
    return other


def table_scale(embedding: nn.Module, y: Tensor) -> Tensor | None:
    """Returns the factor, [] in y's type, by which an embedding that made y multiplies its table;
    None if it does not. A Python number becomes a tensor on y's device without a copy from the
    host.
    """
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return None
    return scale.to(y) if isinstance(scale, Tensor) else y.new_full((), scale)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    """x [rows, width] -> [rows, width]. Computed in whole vectors: torch computes the elements left
    over by other code, which rounds differently.
    """
    width = x.shape[1]
    return ACTIVATIONS[activation](F.pad(x, (0, -width % VECTOR)))[:, :width]


def _scaled(x: Tensor, here: Sequence[tuple[slice, SiteWeights]]) -> Tensor:
    """Returns x, or a copy of it in which the rows of sites with an input scale are scaled."""
    scales = [(rows, s.input_scale) for rows, s in here if s.input_scale is not None]
    if scales:
        x = x.clone()
        for rows, scale in scales:
            x[rows] *= scale
    return x
