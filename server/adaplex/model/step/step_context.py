"""StepContext: what the layers need to know of the step that runs.

Hugging Face modules take no such argument, so one context object per model is shared by its
attention and its linears, and refilled before each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adaplex.model.kv_cache import KVCache
from adaplex.model.linear.backend import LinearBackend


class AdapterRows(Protocol):
    """The adapters of a step, by row, and what they do at a module of each kind. What is called in
    place changes `y`; all tensors have one line a row.
    """

    @property
    def any(self) -> bool:
        """False for a base-only step: then nothing else is called."""
        ...

    def linear(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]: the base's product and what adapters do to it."""
        ...

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """`norm` made y [rows, features], or [rows, heads, features], of x; in place."""
        ...

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """`embedding` made y [rows, hidden] of ids [rows]; in place."""
        ...

    def block(self, name: str, x: Tensor, residual: Tensor, y: Tensor) -> None:
        """A block made y [rows, hidden] of x, the norm of `residual`; in place."""
        ...

    def expert(self, name: str, expert: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """An expert made y [chosen, out] of x [chosen, in], which are `rows` [chosen]; in place."""
        ...


class BaseRows:
    """No row has an adapter."""

    any = False

    def linear(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """See AdapterRows."""
        return backend(x)

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """See AdapterRows."""

    def block(self, name: str, x: Tensor, residual: Tensor, y: Tensor) -> None:
        """See AdapterRows."""

    def expert(self, name: str, expert: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""


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
        self.residual: Tensor | None = None
        """What the last norm read; kept in steps with adapters only."""
        self.rows: AdapterRows = BaseRows()
        """By token row."""
        self.head_rows: AdapterRows = BaseRows()
        """By row of the output layer, which sees only the rows that are sampled."""
