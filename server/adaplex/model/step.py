"""StepContext: what the layers need to know of the step that runs.

Hugging Face modules take no such argument, so one context object per model is shared by its
attention and its linears, and refilled before each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaplex.model.kernels.low_rank import AddLowRank, SiteWeights
from adaplex.model.kv_cache import KVCache
from adaplex.model.linear import LinearBackend


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) whose adapter does more than add a low-rank delta.

    `merged` maps a linear to the dense base plus delta that replaces it, `sites` a module to the
    bias that is added there.
    """

    start: int
    stop: int
    sites: Mapping[str, SiteWeights]
    merged: Mapping[str, LinearBackend] = field(default_factory=dict)

    def covers(self, rows: int) -> bool:
        """Whether it has all rows of a step."""
        return (self.start, self.stop) == (0, rows)


def _nothing(_module: str, _x: Tensor, _y: Tensor) -> None:
    """No row has a low-rank delta."""


@dataclass(frozen=True)
class AdapterRows:
    """The adapters of a step, by row; `any` is false for a base-only step."""

    any: bool = False
    add_low_rank: AddLowRank = _nothing
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences with equally many tokens in the step, in neighbouring rows.

    Rows [start, start + batch * count); tables [batch, blocks] and positions [batch, count].
    """

    start: int
    tables: Tensor
    positions: Tensor

    @property
    def batch(self) -> int:
        """Sequences in the group."""
        return self.positions.shape[0]

    @property
    def count(self) -> int:
        """Tokens of each."""
        return self.positions.shape[1]


class StepContext:
    """The state of one step; the layers hold a reference to it."""

    def __init__(self) -> None:
        self.cache: KVCache | None = None
        self.slots: Tensor = torch.zeros(0, dtype=torch.int64)
        """[rows] where each row's key and value go: block * block_tokens + offset."""
        self.groups: tuple[AttentionGroup, ...] = ()
        self.windows: dict[int, int] = {}
        """Visible keys of each layer that ran, 0 for all."""
        self.rows = AdapterRows()
        """By token row."""
        self.head_rows = AdapterRows()
        """By row of the output layer, which sees only the rows that are sampled."""
