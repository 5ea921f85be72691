"""BaseSpec: the modules and sizes of the base model, as lowering needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

ModuleKind = Literal["linear", "norm", "embedding", "experts", "block"]
"""`block`: a whole attention or MLP, whose output is added to the residual stream; `experts`: one
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
    """True for the output layer, which `all-linear` leaves out."""
    transposed: bool = False
    """True if the base stores the weight as [in, out] (GPT-2's Conv1D)."""
    layer: int = -1
    """Layer index of a block."""
    part: Literal["", "attention", "mlp"] = ""
    """Which of its layer's blocks a block is."""
    joins: bool = False
    """True for a block that follows a norm of the residual stream and whose output is added to the
    stream unchanged, which bottlenecks require."""
    experts: int = 0
    """Number of experts, for the kind `experts`; the features are those of one expert."""


def _unknown(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class BaseSpec:
    """The base model, as lowering needs it."""

    name: str
    digest: str
    model_type: str
    modules: Mapping[str, BaseModule]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 [out_features] for each module with a bias."""
    fingerprint: str = ""
    """SHA-256 of config and weights, before any quantization."""
    aliases: tuple[str, ...] = ()
    """Other names of the same base."""
    heads: int = 0
    """Query heads of the attention; 0 if the config does not specify them."""
    kv_heads: int = 0
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    """(heads, features of a key, features of a value) of each layer."""
    rotary: Tensor | None = None
    """fp32 [features of a key / 2]: radians per position by which RoPE rotates features i and
    i + half of a key; None without RoPE, or if the angles depend on the length."""
    tied: bool = False
    """True if the output layer shares the weight of the embedding."""
    idle: tuple[str, ...] = ()
    """Names of the parts that text never reaches, such as the vision tower."""
    quantization: str = ""
    """Format of the linears' weights; empty if unknown."""
    chat_template: str = ""
    """Template that renders chats; empty if there is none."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Ids of the tokenizer's vocabulary."""
    weight: Callable[[str], Tensor] = _unknown
    """Returns the fp32 effective weight of a module by name, on the base's device: linear
    [out, in], embedding [vocabulary, hidden], norm [features]. KeyError if there is none."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the base."""
        return (self.name, *self.aliases)
