"""AdapterProgram: an adapter lowered to the few primitives that the runtime knows.

A format module reads a checked checkpoint and emits, for each module of the base it touches,
the primitives to apply there. Layers, kernels and the arena know only these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT

ModuleKind = Literal["linear", "norm"]
TensorRole = Literal["a", "b", "bias"]
ELEMENT_BYTES = (2, 4)
"""Of the compute dtypes."""


@dataclass(frozen=True)
class BaseModule:
    """One module of the base that an adapter may touch, in [out, in] orientation."""

    name: str
    kind: ModuleKind
    in_features: int
    out_features: int
    has_bias: bool = False
    is_head: bool = False
    """The output layer, which `all-linear` leaves out."""
    transposed: bool = False
    """Stored as [in, out] by the base (GPT-2's Conv1D)."""


@dataclass(frozen=True)
class BaseSpec:
    """What lowering needs to know of the base model."""

    name: str
    digest: str
    model_type: str
    modules: Mapping[str, BaseModule]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 [out_features] for each module with a bias."""
    fingerprint: str = ""
    """SHA-256 of config and weights, before any quantization."""
    aliases: tuple[str, ...] = ()
    """Other names that the same base goes by."""
    heads: int = 0
    """Attention heads of the queries; 0 where the config does not say."""
    kv_heads: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the base."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class LowRank:
    """y += b (a x). The adapter's scale is folded into b."""

    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return self.a.shape[0]


@dataclass(frozen=True)
class ModuleProgram:
    """The primitives applied at one module, in the order low rank, bias."""

    module: str
    low_rank: LowRank | None = None
    bias: Tensor | None = None  # [out_features], added to the output
    scale: float = 1.0
    """The scale folded into `low_rank.b`; kept for reports."""

    def tensors(self) -> Iterator[tuple[TensorRole, Tensor]]:
        """The tensors in canonical order, as they are packed: a [rank, in], b [rank, out]."""
        if self.low_rank is not None:
            yield "a", self.low_rank.a
            yield "b", self.low_rank.b.T
        if self.bias is not None:
            yield "bias", self.bias


@dataclass(frozen=True)
class PackedTensor:
    """Where one tensor lies in a packed adapter; `offset` in elements of the compute dtype."""

    module: str
    role: TensorRole
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterProgram:
    """A whole adapter: identity, family, and what it does to each module (sorted by name)."""

    digest: str
    family: str
    modules: tuple[ModuleProgram, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Why its answers may not be what its author meant."""

    @property
    def max_rank(self) -> int:
        """The largest rank of any module, 0 when there is no low-rank delta."""
        return max((m.low_rank.rank for m in self.modules if m.low_rank is not None), default=0)

    def layout(self, element_bytes: int) -> tuple[PackedTensor, ...]:
        """Places every tensor, in canonical order, each aligned to ALIGNMENT bytes."""
        step = ALIGNMENT // element_bytes
        placed, offset = [], 0
        for module in self.modules:
            for role, tensor in module.tensors():
                placed.append(PackedTensor(module.module, role, offset, tuple(tensor.shape)))
                offset += -(-tensor.numel() // step) * step
        return tuple(placed)

    def packed_bytes(self, element_bytes: int) -> int:
        """Bytes of the packed adapter: the extent it needs in the arena."""
        step = ALIGNMENT // element_bytes
        elements = sum(
            -(-tensor.numel() // step) * step
            for module in self.modules
            for _, tensor in module.tensors()
        )
        return elements * element_bytes

    def pack_into(self, extent: Tensor) -> None:
        """Copies every tensor into `extent`, a flat tensor of the compute dtype.

        `extent` holds at least packed_bytes() / element size elements.
        """
        tensors = (tensor for module in self.modules for _, tensor in module.tensors())
        for place, tensor in zip(self.layout(extent.element_size()), tensors, strict=True):
            extent[place.offset : place.offset + tensor.numel()].copy_(tensor.reshape(-1))
