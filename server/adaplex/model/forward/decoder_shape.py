"""DecoderShape: the parts of a base that the C decoder reads, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from adaplex.model.kernels.paged_kv import AttentionOptions
from adaplex.model.linear.native import NativeLinear


class OtherShape(Exception):
    """The C decoder cannot run the base; the message names the part that it lacks."""


@dataclass(frozen=True)
class Linear:
    """A linear in panels, and the name of its module."""

    name: str
    backend: NativeLinear


@dataclass(frozen=True)
class Norm:
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias."""

    name: str
    weight: Tensor
    """fp32 [features], `offset` included."""
    bias: Tensor | None
    """fp32 [features]."""
    epsilon: float
    centered: bool
    """False for an RMSNorm, whose mean counts as zero."""
    offset: float
    """Added to the module's weight, and to one by which an adapter replaces it: 1 in Gemma."""


@dataclass(frozen=True)
class Rotary:
    """Rotations of the first dimensions of a head, by position."""

    cosines: Tensor
    """fp32 [positions, rotated / 2]."""
    sines: Tensor
    """fp32 [positions, rotated / 2]."""

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return 2 * self.cosines.shape[1]


@dataclass(frozen=True)
class Attention:
    """The attention of a layer."""

    name: str
    qkv: tuple[Linear, ...]
    """q, k and v; or one whose outputs are q | k | v."""
    out: Linear
    q_norm: Norm | None
    """Norm of each head of queries."""
    k_norm: Norm | None
    """Norm of each head of keys."""
    rotary: Rotary | None
    options: AttentionOptions


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer: down(activation(gate) * up), or down(activation(up)) if not gated."""

    name: str
    gate_up: tuple[Linear, ...]
    """gate and up; or one whose outputs are gate | up; or up."""
    down: Linear
    gated: bool
    activation: int
    """Numbered as in activations.h."""


class LayerKind(NamedTuple):
    """Facts in which all layers of a decoder agree."""

    queries: int
    """Features of all heads of queries."""
    rotated: int
    """Dimensions of a head that are rotated."""
    middle: int
    """Features between the linears of the MLP."""
    gated: bool
    activation: int


@dataclass(frozen=True)
class DecoderLayer:
    """residual += attention_out_norm(attention(attention_norm(residual))), then likewise for the
    MLP.
    """

    attention: Attention
    mlp: Mlp
    attention_norm: Norm
    attention_out_norm: Norm | None
    mlp_norm: Norm
    mlp_out_norm: Norm | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears, in the order of their work."""
        attention, mlp = self.attention, self.mlp
        return (*attention.qkv, attention.out, *mlp.gate_up, mlp.down)

    @property
    def kind(self) -> LayerKind:
        """The facts in which it has to agree with the other layers."""
        rotary, mlp = self.attention.rotary, self.mlp
        return LayerKind(
            queries=self.attention.out.backend.in_features,
            rotated=0 if rotary is None else rotary.rotated,
            middle=mlp.down.backend.in_features,
            gated=mlp.gated,
            activation=mlp.activation,
        )


@dataclass(frozen=True)
class DecoderShape:
    """The whole decoder."""

    embedding_name: str
    embedding: Tensor
    """[vocabulary, hidden] in the compute dtype."""
    embedding_scale: float
    """Factor of the embeddings of tokens, rounded as the module rounds it."""
    position_embedding: Tensor | None
    """[positions, hidden] in the compute dtype, added to the embeddings of tokens."""
    layers: tuple[DecoderLayer, ...]
    """Layers of one kind."""
    final_norm: Norm
    head: Linear
    logit_softcap: float
    """logit = logit_softcap * tanh(logit / logit_softcap); 0 for none."""
    kv_heads: int
    head_dim: int
    positions: int
    """Positions that the tables of rotations and embeddings cover."""
