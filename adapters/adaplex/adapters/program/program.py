"""AdapterProgram: an adapter lowered to the primitives of the runtime.

A format reads a checked checkpoint and emits the primitives to apply at each module of the base.
Layers, kernels and the arena handle only primitives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT
from adaplex.adapters.program.primitives import (
    Bottleneck,
    KVPrefix,
    LowRank,
    ReplacedRows,
    Transform,
)
from adaplex.adapters.program.traits import AdapterTraits

TensorRole = Literal[
    "a", "b", "inner", "bias", "output_scale", "input_scale", "weight", "rows", "virtual", "keys",
    "values",
]  # fmt: skip
ELEMENT_BYTES = (2, 4)
"""Bytes of an element of the compute dtypes."""
PANEL = 16
"""Rows of a panel. A replaced weight [out, in] is packed in whole panels, padded with zeros."""


@dataclass(frozen=True)
class ModuleProgram:
    """Primitives applied at one module: y = output_scale * (W (input_scale * x) + base bias)
    + b (a (input_scale * x)) + bias, where `weight` replaces W if given.
    """

    module: str
    low_rank: LowRank | None = None
    bias: Tensor | None = None  # [out_features], added to the output
    scale: float = 1.0
    """Scale that is folded into `low_rank.b`, for reports."""
    output_scale: Tensor | None = None  # [out_features], linears only
    input_scale: Tensor | None = None  # [in_features], linears only
    weight: Tensor | None = None
    """Replaces the base's weight: linear [out, in], norm [features], embedding [vocabulary,
    hidden]."""
    rows: ReplacedRows | None = None
    """Embedding and output layer only."""
    bottleneck: Bottleneck | None = None
    """Blocks only."""
    virtual: Tensor | None = None
    """[tokens, hidden], embedding only: virtual tokens before the prompt."""
    prefix: KVPrefix | None = None
    """Attention blocks only."""
    transform: Transform | None = None
    """Linears only. An adapter with a transform can only be merged."""

    def tensors(self) -> Iterator[tuple[TensorRole, Tensor]]:
        """Yields the tensors in canonical order and packed layout: a [rank, in], b [rank, out]; for
        an embedding a [vocabulary, rank]; for a bottleneck `down` as a, `up` as b, `up_bias` as
        bias.
        """
        if self.low_rank is not None:
            yield "a", self.low_rank.a.T if self.low_rank.lookup else self.low_rank.a
            yield "b", self.low_rank.b.T
        if self.bottleneck is not None:
            yield "a", self.bottleneck.down
            yield "b", self.bottleneck.up.T
            if self.bottleneck.down_bias is not None:
                yield "inner", self.bottleneck.down_bias
            if self.bottleneck.up_bias is not None:
                yield "bias", self.bottleneck.up_bias
        if self.prefix is not None:
            yield "keys", self.prefix.keys
            yield "values", self.prefix.values
        single: tuple[tuple[TensorRole, Tensor | None], ...] = (
            ("bias", self.bias),
            ("output_scale", self.output_scale),
            ("input_scale", self.input_scale),
            ("weight", self.weight),
            ("rows", None if self.rows is None else self.rows.weight),
            ("virtual", self.virtual),
        )
        yield from ((role, tensor) for role, tensor in single if tensor is not None)

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives, for reports."""
        found = {
            "low-rank": self.low_rank,
            "bias": self.bias,
            "output scale": self.output_scale,
            "input scale": self.input_scale,
            "replaced weight": self.weight,
            "replaced rows": self.rows,
            "bottleneck": self.bottleneck,
            "virtual tokens": self.virtual,
            "KV prefix": self.prefix,
            "merged weight": self.transform,
        }
        return tuple(name for name, primitive in found.items() if primitive is not None)


@dataclass(frozen=True)
class PackedTensor:
    """Place of one tensor in a packed adapter; `offset` in elements of the compute dtype.

    The rows of a replaced weight [out, in] are rounded up to whole panels.
    """

    module: str
    role: TensorRole
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterProgram:
    """A lowered adapter: digest, family, and a program for each module, sorted by name."""

    digest: str
    family: str
    modules: tuple[ModuleProgram, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Reasons why the answers may differ from what the adapter's author meant."""

    invocation: tuple[int, ...] = ()
    """See AdapterTraits."""

    @cached_property
    def traits(self) -> AdapterTraits:
        """Facts of the adapter that its report, its catalog record and requests carry."""
        ranks = (m.low_rank.rank for m in self.modules if m.low_rank is not None)
        return AdapterTraits(
            modules=len(self.modules),
            max_rank=max(ranks, default=0),
            leading=self.prefix_tokens + self.virtual_tokens,
            invocation=self.invocation,
            merged_only=any(m.transform is not None for m in self.modules),
        )

    @cached_property
    def prefix_tokens(self) -> int:
        """Positions of the KV prefix, before the prompt."""
        return max((len(m.prefix.keys) for m in self.modules if m.prefix is not None), default=0)

    @cached_property
    def virtual_tokens(self) -> int:
        """Virtual tokens, between the KV prefix and the prompt."""
        return max((len(m.virtual) for m in self.modules if m.virtual is not None), default=0)

    def layout(self, element_bytes: int, order: Mapping[str, int]) -> tuple[PackedTensor, ...]:
        """Returns the places of all tensors, aligned to ALIGNMENT bytes, in the order in which a
        step reads them: every `a` first, then all others. `order` numbers the base's modules.
        """
        step = ALIGNMENT // element_bytes
        placed, offset = [], 0
        for module, role, tensor in self._tensors(order):
            shape = _packed_shape(role, tensor)
            placed.append(PackedTensor(module, role, offset, shape))
            offset += -(-math.prod(shape) // step) * step
        return tuple(placed)

    def packed_bytes(self, element_bytes: int) -> int:
        """Returns the bytes of the packed adapter: the size of its extent in the arena."""
        step = ALIGNMENT // element_bytes
        shapes = (_packed_shape(*pair) for module in self.modules for pair in module.tensors())
        return sum(-(-math.prod(shape) // step) * step for shape in shapes) * element_bytes

    def pack_into(self, extent: Tensor, order: Mapping[str, int]) -> None:
        """Copies every tensor into `extent`, a flat tensor of zeros in the compute dtype.

        `extent` has at least packed_bytes() / element size elements; `order` as in `layout`.
        """
        tensors = (tensor for _, _, tensor in self._tensors(order))
        for place, tensor in zip(self.layout(extent.element_size(), order), tensors, strict=True):
            extent[place.offset : place.offset + tensor.numel()].copy_(tensor.reshape(-1))

    def _tensors(self, order: Mapping[str, int]) -> list[tuple[str, TensorRole, Tensor]]:
        """Returns module, role and tensor of every packed tensor, in the order of `layout`."""
        found = [(m.module, role, tensor) for m in self.modules for role, tensor in m.tensors()]
        return sorted(found, key=lambda each: (each[1] != "a", order[each[0]]))


def _packed_shape(role: TensorRole, tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if role == "weight" and len(shape) == 2:
        return -(-shape[0] // PANEL) * PANEL, shape[1]
    return shape
