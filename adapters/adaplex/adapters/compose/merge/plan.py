"""MergePlan: parameters of a merge. The methods are those of PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from adaplex.adapters.errors import AdapterInvalid

MAX_SOURCES = 8


class MergeMethod(StrEnum):
    """How the values of several adapters are merged.

    Methods with SVD in their name work on the product B A, the others on A and B separately.
    """

    LINEAR = "linear"
    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    TIES_SVD = "ties_svd"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    DARE_LINEAR_SVD = "dare_linear_svd"
    DARE_TIES_SVD = "dare_ties_svd"
    MAGNITUDE_PRUNE = "magnitude_prune"
    MAGNITUDE_PRUNE_SVD = "magnitude_prune_svd"

    @property
    def on_deltas(self) -> bool:
        """True if the method merges whole deltas, and factors the result by SVD."""
        return self.value.endswith("svd")

    @property
    def any_ranks(self) -> bool:
        """True if the sources' ranks at a module may differ."""
        return self.on_deltas or self is MergeMethod.CAT

    @property
    def prunes(self) -> bool:
        """True if the method drops values, and so needs a density."""
        return self.value not in ("linear", "cat", "svd")

    @property
    def elects(self) -> bool:
        """True if a majority of the sources determines each value's sign."""
        return "ties" in self.value

    @property
    def draws(self) -> bool:
        """True if values are dropped at random."""
        return "dare" in self.value


@dataclass(frozen=True)
class MergePlan:
    """Method and parameters of a merge."""

    method: MergeMethod
    weights: tuple[float, ...]
    density: float | None = None
    """Fraction of values that pruning keeps."""
    majority_sign: Literal["total", "frequency"] = "total"
    """Whether the sign is elected by the sum of the values, or by their number."""
    rank: int | None = None
    """Largest rank of an SVD method's result; None: the largest rank of the sources."""
    seed: int = 0
    """Seed of random dropping; 64 bits, of which torch uses the lower half."""

    def check(self, sources: int) -> None:
        """Raises AdapterInvalid naming the field."""
        unused = f"has no effect with {self.method}; leave it out"
        if not 1 <= sources <= MAX_SOURCES:
            raise AdapterInvalid.because("sources", f"must be 1 to {MAX_SOURCES}, not {sources}")
        if len(self.weights) != sources:
            reason = f"must be {sources}, one for each source, not {len(self.weights)}"
            raise AdapterInvalid.because("weights", reason)
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise AdapterInvalid.because("weights", "must be finite, and not all 0")
        if self.method.prunes and not (self.density is not None and 0 < self.density <= 1):
            reason = f"must be in (0, 1] for {self.method}, not {self.density}"
            raise AdapterInvalid.because("density", reason)
        if not self.method.prunes and self.density is not None:
            raise AdapterInvalid.because("density", unused)
        if self.majority_sign == "frequency" and not self.method.elects:
            raise AdapterInvalid.because("majority_sign", unused)
        if self.rank is not None and not self.method.on_deltas:
            raise AdapterInvalid.because("rank", unused)
        if self.rank is not None and self.rank < 1:
            raise AdapterInvalid.because("rank", f"must be at least 1, not {self.rank}")
        if not 0 <= self.seed < 1 << 64:
            raise AdapterInvalid.because("seed", f"must be in [0, 2**64), not {self.seed}")
