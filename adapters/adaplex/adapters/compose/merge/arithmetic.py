"""Arithmetic: the pairs that several adapters have at one module, merged into one.

Task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099) and magnitude pruning, on
the factors or on the whole delta, as PEFT's `add_weighted_adapter` does them.
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
    """One source's pair at a module; it adds weight * scale * b a."""

    a: Tensor  # [rank, in], fp32
    b: Tensor  # [out, rank], fp32, without the scale
    scale: float
    weight: float

    @property
    def strength(self) -> float:
        """What the product is multiplied by."""
        return self.weight * self.scale


class Arithmetic:
    """One plan at work. Draws in PEFT's order: module by module, a before b, source by source."""

    def __init__(self, plan: MergePlan, rank: int) -> None:
        """`rank` is the most that an SVD method's result may have."""
        self._plan, self._rank = plan, rank
        self._dice = torch.Generator().manual_seed(plan.seed)

    def merged(self, parts: Sequence[Factors]) -> Pair:
        """The merged pair of one module, in fp32, with scale 1. Raises OverflowError."""
        a, b = self._merged(parts)
        return finite(a), finite(b)

    def _merged(self, parts: Sequence[Factors]) -> Pair:
        if self._plan.method is MergeMethod.CAT:
            return concatenated(parts)
        if self._plan.method is MergeMethod.SVD:
            return truncated(*concatenated(parts), self._rank)
        if self._plan.method.on_deltas:
            deltas = [part.b @ part.a * part.scale for part in parts]
            return factored(self._sum(deltas, [part.weight for part in parts]), self._rank)
        # half of the strength goes into each factor, its sign into a alone
        roots = [math.sqrt(abs(part.strength)) for part in parts]
        signed = [math.copysign(root, p.strength) for root, p in zip(roots, parts, strict=True)]
        a = self._sum([part.a for part in parts], signed)
        return a, self._sum([part.b for part in parts], roots)

    def _sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum of what pruning leaves of the tensors; of those that agree with the
        elected sign, the weighted mean.
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
        """The tensor without what the method drops."""
        density = self._plan.density
        if density is None:
            return tensor
        if self._plan.method.draws:
            kept = torch.bernoulli(torch.full_like(tensor, density), generator=self._dice)
            return tensor * kept / density
        count = int(density * tensor.numel())
        mask = torch.zeros(tensor.numel())
        mask[torch.topk(tensor.abs().flatten(), count).indices] = 1
        return tensor * mask.view_as(tensor)


def concatenated(parts: Sequence[Factors]) -> Pair:
    """The exact sum: a stacked, with the strengths, and b side by side."""
    a = torch.cat([part.a * part.strength for part in parts])
    return a, torch.cat([part.b for part in parts], dim=1)


def finite(tensor: Tensor) -> Tensor:
    """The tensor. Raises OverflowError when it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise OverflowError
    return tensor


def factored(delta: Tensor, rank: int) -> Pair:
    """The pair of the rank, or less, whose product is nearest to delta [out, in].

    Takes a full SVD, whose time grows with the cube of the size. Raises OverflowError.
    """
    u, s, vh = torch.linalg.svd(finite(delta), full_matrices=False)
    return vh[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


def truncated(a: Tensor, b: Tensor, rank: int) -> Pair:
    """As `factored(b @ a, rank)`, in the time of an SVD of the pair's own rank."""
    q_a, r_a = torch.linalg.qr(a.T)  # [in, k], [k, rank of the pair]
    q_b, r_b = torch.linalg.qr(b)
    inner_a, inner_b = factored(r_b @ r_a.T, rank)
    return (inner_a @ q_a.T).contiguous(), (q_b @ inner_b).contiguous()
