"""StepContext: what the layers of a model read of the step that runs.

Modules of transformers accept no such argument, so the attention and the linears of a model share
one context object, which is refilled before each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adaplex.model.kernels.paged_kv import AttentionOptions
from adaplex.model.kv_cache import KVCache
from adaplex.model.linear.backend import LinearBackend


class AdapterRows(Protocol):
    """The adapters of a step, by row, and what they do at a module of each kind.

    All tensors have one line a row; every method but `linear` changes `y` in place.
    """

    @property
    def any(self) -> bool:
        """False for a base-only step: then no method is called."""
        ...

    def linear(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]: the base's product and what adapters do to it."""
        ...

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """y [rows, features], or [rows, heads, features], is what `norm` made of x."""
        ...

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """y [rows, hidden] is what `embedding` made of ids [rows]."""
        ...

    def block(self, name: str, x: Tensor, residual: Tensor, y: Tensor) -> None:
        """y [rows, hidden] is what a block made of x, which is the norm of `residual`."""
        ...

    def expert(self, name: str, expert: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """y [chosen, out] is what an expert made of x [chosen, in], the rows `rows` [chosen]."""
        ...


class BaseRows:
    """AdapterRows of a step in which no row has an adapter."""

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
    """Sequences with equally many tokens in the step, in neighbouring rows
    [start, start + batch * count).
    """

    start: int
    tables: Tensor
    """int64 [batch, blocks]."""
    positions: Tensor
    """int64 [batch, count]."""

    @property
    def batch(self) -> int:
        """Sequences in the group."""
        return self.positions.shape[0]

    @property
    def count(self) -> int:
        """Tokens of each sequence."""
        return self.positions.shape[1]


class StepContext:
    """The state of one step; the layers of a model share a reference to it."""

    def __init__(self) -> None:
        self.cache: KVCache | None = None
        self.slots: Tensor = torch.zeros(0, dtype=torch.int64)
        """int64 [rows]: where each row's key and value go, block * block_tokens + offset."""
        self.groups: tuple[AttentionGroup, ...] = ()
        self.attention: dict[int, AttentionOptions] = {}
        """How each layer that ran scores keys."""
        self.residual: Tensor | None = None
        """Input of the last norm; set in steps with adapters only."""
        self.rows: AdapterRows = BaseRows()
        """Adapters by token row."""
        self.head_rows: AdapterRows = BaseRows()
        """Adapters by row of the output layer, whose rows are the sampled ones only."""
