"""BaseSpec: what lowering knows of the base model, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

ModuleKind = Literal["linear", "norm", "embedding", "experts", "block"]
"""A `block` is attention or MLP as a whole, whose output joins the residual stream; `experts` one
weight of all experts of a layer."""


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
    layer: int = -1
    """Of a block: which layer it is in."""
    part: Literal["", "attention", "mlp"] = ""
    """Of a block."""
    joins: bool = False
    """Of a block: it follows a norm of the residual stream, and its output is added to that as it
    is; bottlenecks need that."""
    experts: int = 0
    """Of the kind `experts`: how many there are; the features are those of one."""


def _unknown(name: str) -> Tensor:
    raise KeyError(name)


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
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    """(heads, features of a key, features of a value) of each layer."""
    rotary: Tensor | None = None
    """fp32 [features of a key / 2]: radians a position by which a key's features i and i + half are
    turned; None where there is no such table, or it changes with the length."""
    tied: bool = False
    """Whether the output layer uses the weight of the embedding."""
    quantization: str = ""
    """How the linears are kept; empty where it is not known."""
    weight: Callable[[str], Tensor] = _unknown
    """fp32 weight in effect of a module by name: linear and embedding [out, in] ([vocabulary,
    hidden] for the embedding), norm [features]; where the base runs. KeyError for one that has
    none."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the base."""
        return (self.name, *self.aliases)
