"""Arithmetic: merges the low-rank pairs of several adapters at one module into one pair.

Task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099) and magnitude pruning, on
the factors or on the whole delta, as in PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.compose.merge.plan import MergeMethod, MergePlan

Pair = tuple[Tensor, Tensor]
"""a [rank, in] and b [out, rank]."""


@dataclass(frozen=True)
class Factors:
    """Pair of one source at a module, which adds weight * scale * b a."""

    a: Tensor  # [rank, in], fp32
    b: Tensor  # [out, rank], fp32, without the scale
    scale: float
    weight: float

    @property
    def strength(self) -> float:
        """Factor of the product b a."""
        return self.weight * self.scale


class Arithmetic:
    """Applies one plan. Draws random numbers in PEFT's order: by module, a before b, by source."""

    def __init__(self, plan: MergePlan, rank: int) -> None:
        """`rank` bounds the rank of the result of an SVD method."""
        self._plan, self._rank = plan, rank
        self._generator = torch.Generator().manual_seed(plan.seed)

    def merged(self, sources: Sequence[Factors]) -> Pair:
        """Returns the merged pair of one module, in fp32, with scale 1. Raises OverflowError."""
        a, b = self._merged(sources)
        return finite(a), finite(b)

    def _merged(self, sources: Sequence[Factors]) -> Pair:
        if self._plan.method is MergeMethod.CAT:
            return concatenated(sources)
        if self._plan.method is MergeMethod.SVD:
            return truncated(*concatenated(sources), self._rank)
        if self._plan.method.on_deltas:
            deltas = [source.b @ source.a * source.scale for source in sources]
            return factored(self._sum(deltas, [source.weight for source in sources]), self._rank)
        # each factor is scaled by the root of the strength, and a also by its sign
        roots = [math.sqrt(abs(source.strength)) for source in sources]
        signed = [math.copysign(root, s.strength) for root, s in zip(roots, sources, strict=True)]
        a = self._sum([source.a for source in sources], signed)
        return a, self._sum([source.b for source in sources], roots)

    def _sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Returns the weighted sum of the pruned tensors; with sign election, the weighted mean of
        those that agree with the elected sign.
        """
        stack = torch.stack([self._pruned(tensor) for tensor in tensors])  # [sources, ...]
        weighted = stack * torch.tensor(weights)[:, None, None]
        if not self._plan.method.elects:
            return weighted.sum(dim=0)
        votes = stack if self._plan.majority_sign == "total" else stack.sign()
        elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
        agree = stack.sign() == elected
        return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        """Returns the tensor with the values that the method drops set to 0."""
        density = self._plan.density
        if density is None:
            return tensor
        if self._plan.method.draws:
            kept = torch.bernoulli(torch.full_like(tensor, density), generator=self._generator)
            return tensor * kept / density
        count = int(density * tensor.numel())
        mask = torch.zeros(tensor.numel())
        mask[torch.topk(tensor.abs().flatten(), count).indices] = 1
        return tensor * mask.view_as(tensor)


def concatenated(sources: Sequence[Factors]) -> Pair:
    """Returns the exact sum: a stacked and scaled by the strengths, b side by side."""
    a = torch.cat([source.a * source.strength for source in sources])
    return a, torch.cat([source.b for source in sources], dim=1)


def finite(tensor: Tensor) -> Tensor:
    """Returns the tensor. Raises OverflowError if it contains NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise OverflowError
    return tensor


def factored(delta: Tensor, rank: int) -> Pair:
    """Returns the pair of at most this rank whose product is closest to delta [out, in].

    Uses a full SVD, whose time grows with the cube of the size. Raises OverflowError.
    """
    u, s, vh = torch.linalg.svd(finite(delta), full_matrices=False)
    return vh[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


def truncated(a: Tensor, b: Tensor, rank: int) -> Pair:
    """Returns `factored(b @ a, rank)`, in the time of an SVD of the pair's own rank."""
    q_a, r_a = torch.linalg.qr(a.T)  # [in, k], [k, rank of the pair]
    q_b, r_b = torch.linalg.qr(b)
    inner_a, inner_b = factored(r_b @ r_a.T, rank)
    return (inner_a @ q_a.T).contiguous(), (q_b @ inner_b).contiguous()
