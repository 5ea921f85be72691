"""Roofline: the least time of a decode step, from the bytes it must read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adaplex.client.types import BaseModelInfo


@dataclass(frozen=True)
class StepBytes:
    """What one decode step reads: the weights once, each distinct adapter once, every row's KV."""

    weights: int
    adapters: int
    kv: int

    @classmethod
    def of(
        cls, model: BaseModelInfo, adapters: Iterable[int], rows: int, context: float
    ) -> StepBytes:
        """`adapters` are the packed bytes of the distinct ones, `context` the tokens of a row."""
        return cls(
            weights=model.step_weight_bytes,
            adapters=sum(adapters),
            kv=int(rows * context * model.kv_token_bytes),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.kv


@dataclass(frozen=True)
class Roofline:
    """A decode step against its floor. Bandwidth in bytes/s, times in milliseconds."""

    step: StepBytes
    bandwidth: float
    floor: float
    measured: float
    share: float

    @classmethod
    def of(cls, step: StepBytes, bandwidth: float, measured: float) -> Roofline:
        """`measured` is the milliseconds that a step took."""
        floor = 1e3 * step.total / bandwidth
        return cls(step, bandwidth, floor, measured, floor / measured)
