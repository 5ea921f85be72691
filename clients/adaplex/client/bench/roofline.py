"""Roofline: the least time of a decode step, given the bytes that it must read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adaplex.client.types import BaseModelInfo


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a decode step reads: the weights and each distinct adapter once, and the keys and
    values of every row.
    """

    weights: int
    adapters: int
    kv: int

    @classmethod
    def of(
        cls, model: BaseModelInfo, adapters: Iterable[int], rows: int, context: float
    ) -> StepBytes:
        """Sums up a step of `rows` rows; `adapters` are the packed bytes of each distinct adapter,
        `context` the tokens of a row.
        """
        return cls(
            weights=model.step_weight_bytes,
            adapters=sum(adapters),
            kv=int(rows * context * model.kv_token_bytes),
        )

    @property
    def total(self) -> int:
        """Total bytes of the step."""
        return self.weights + self.adapters + self.kv


@dataclass(frozen=True)
class Roofline:
    """A decode step and its floor. `bandwidth` is in bytes/s, `floor` and `measured` are in
    milliseconds, `share` is their ratio.
    """

    step: StepBytes
    bandwidth: float
    floor: float
    measured: float
    share: float

    @classmethod
    def of(cls, step: StepBytes, bandwidth: float, measured: float) -> Roofline:
        """Compares a step that took `measured` milliseconds with its floor at the bandwidth."""
        floor = 1e3 * step.total / bandwidth
        return cls(step, bandwidth, floor, measured, floor / measured)
