"""Primitives: the operations that the runtime can apply at a module of the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """y += b (a x), with the adapter's scale folded into b.

    On an embedding, x is the one-hot token and in_features the vocabulary. On experts, the pairs
    are concatenated expert by expert: a [experts * rank, in], b [out, experts * rank].
    """

    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]
    group: int = 1
    """Number of neighbouring columns of `a` that are equal (QA-LoRA); 1 otherwise."""
    lookup: bool = False
    """True on an embedding, where columns of `a` are looked up: `a` is packed transposed."""

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return self.a.shape[0]


class Activation(StrEnum):
    """Activation between the two projections of a bottleneck."""

    IDENTITY = "identity"
    RELU = "relu"
    GELU = "gelu"
    """Exact, with erf."""
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    LEAKY_RELU = "leaky_relu"
    """Slope 0.01."""


class Reads(StrEnum):
    """Input of a bottleneck. The block's output y is added to the residual stream r."""

    OUTPUT = "output"
    """y."""
    SUM = "sum"
    """r + y."""
    INPUT = "input"
    """The block's input: r after its norm."""
    RESIDUAL = "residual"
    """r."""


@dataclass(frozen=True)
class Bottleneck:
    """y += up f(down x + down_bias) + up_bias at a block, with the adapter's scale folded into up
    and up_bias.
    """

    down: Tensor  # [width, hidden]
    up: Tensor  # [hidden, width]
    down_bias: Tensor | None = None  # [width]
    up_bias: Tensor | None = None  # [hidden]
    activation: Activation = Activation.RELU
    reads: Reads = Reads.OUTPUT


@dataclass(frozen=True)
class ReplacedRows:
    """Replaces rows of the embedding's or the output layer's weight [vocabulary, features]."""

    ids: tuple[int, ...]
    """Ascending."""
    weight: Tensor  # [len(ids), features]


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values before the first token of one attention block, in the KV cache's layout."""

    keys: Tensor  # [tokens, kv_heads, features]
    values: Tensor  # [tokens, kv_heads, features]


Transform = Callable[[Tensor], Tensor]
"""Maps the base's weight, fp32 [out, in], to the weight that replaces it."""
