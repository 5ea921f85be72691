"""MergePlan: how several adapters become one. The methods are those of PEFT's
`add_weighted_adapter`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from adaplex.adapters.errors import AdapterInvalid

MAX_SOURCES = 8


class MergeMethod(StrEnum):
    """How the values of several adapters become one.

    Those on factors work on A and B by themselves, those with SVD on the product B A.
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
        """Whether it works on whole deltas, and an SVD makes factors of the result."""
        return self.value.endswith("svd")

    @property
    def any_ranks(self) -> bool:
        """Whether the ranks that meet at a module may differ."""
        return self.on_deltas or self is MergeMethod.CAT

    @property
    def prunes(self) -> bool:
        """Whether it drops values, and so needs a density."""
        return self.value not in ("linear", "cat", "svd")

    @property
    def elects(self) -> bool:
        """Whether a majority decides each value's sign."""
        return "ties" in self.value

    @property
    def draws(self) -> bool:
        """Whether chance decides what is dropped."""
        return "dare" in self.value


@dataclass(frozen=True)
class MergePlan:
    """What to make of the sources."""

    method: MergeMethod
    weights: tuple[float, ...]
    density: float | None = None
    """Share of values that pruning keeps."""
    majority_sign: Literal["total", "frequency"] = "total"
    """Whether values elect a sign by their sum, or by their number."""
    rank: int | None = None
    """Of an SVD method's result, which may need less; by default the largest of the sources."""
    seed: int = 0
    """Of what is dropped by chance; 64 bits, of which torch uses the lower half."""

    def check(self, sources: int) -> None:
        """Raises AdapterInvalid naming the field."""
        if not 1 <= sources <= MAX_SOURCES:
            raise AdapterInvalid.because("sources", f"must be 1 to {MAX_SOURCES}, not {sources}")
        if len(self.weights) != sources:
            raise AdapterInvalid.because("weights", f"must be {sources}, one for each source")
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise AdapterInvalid.because("weights", "must be finite, and not all 0")
        if self.method.prunes and not (self.density is not None and 0 < self.density <= 1):
            raise AdapterInvalid.because("density", f"must be in (0, 1] for {self.method}")
        if not self.method.prunes and self.density is not None:
            raise AdapterInvalid.because("density", f"means nothing to {self.method}")
        if self.majority_sign == "frequency" and not self.method.elects:
            raise AdapterInvalid.because("majority_sign", f"means nothing to {self.method}")
        if self.rank is not None and not self.method.on_deltas:
            raise AdapterInvalid.because("rank", f"means nothing to {self.method}")
        if self.rank is not None and self.rank < 1:
            raise AdapterInvalid.because("rank", f"must be at least 1, not {self.rank}")
        if not 0 <= self.seed < 1 << 64:
            raise AdapterInvalid.because("seed", "must be an unsigned number of 64 bits")
