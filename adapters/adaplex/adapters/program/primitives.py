"""The primitives that the runtime knows: all that an adapter can do to a module of the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """y += b (a x). The adapter's scale is folded into b.

    On an embedding x is the one-hot token: in_features is the vocabulary. On experts the ranks of
    all experts lie behind each other: a [experts * rank, in], b [out, experts * rank].
    """

    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]
    group: int = 1
    """So many neighbouring columns of `a` are equal, always (QA-LoRA)."""
    lookup: bool = False
    """Of an embedding: a column of `a` is looked up, so they are packed one after the other."""

    @property
    def rank(self) -> int:
        """Number of rows of `a`."""
        return self.a.shape[0]


class Activation(StrEnum):
    """What a bottleneck does to its narrow middle."""

    IDENTITY = "identity"
    RELU = "relu"
    GELU = "gelu"
    """By erf."""
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    LEAKY_RELU = "leaky_relu"
    """Slope 0.01."""


class Reads(StrEnum):
    """What a bottleneck reads. The block's output y joins the residual stream r: r + y."""

    OUTPUT = "output"
    """y."""
    SUM = "sum"
    """r + y."""
    INPUT = "input"
    """What the block reads: r after its norm."""
    RESIDUAL = "residual"
    """r."""


@dataclass(frozen=True)
class Bottleneck:
    """y += up f(down x + down_bias) + up_bias, at a block, its scale folded into both of up."""

    down: Tensor  # [width, hidden]
    up: Tensor  # [hidden, width]
    down_bias: Tensor | None = None  # [width]
    up_bias: Tensor | None = None  # [hidden]
    activation: Activation = Activation.RELU
    reads: Reads = Reads.OUTPUT


@dataclass(frozen=True)
class ReplacedRows:
    """Some rows of an embedding's table, or of the output layer's weight, are others."""

    ids: tuple[int, ...]
    """Ascending."""
    weight: Tensor  # [len(ids), features]


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values before the first token, of one attention block, as the cache keeps them."""

    keys: Tensor  # [tokens, kv_heads, features]
    values: Tensor  # [tokens, kv_heads, features]


Transform = Callable[[Tensor], Tensor]
"""The base's weight, fp32 [out, in] -> the one that stands in for it."""
