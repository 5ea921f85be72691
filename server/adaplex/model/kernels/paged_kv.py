"""Arguments of paged attention, which the reference and Triton share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one layer in blocks, and which of them some sequences see.

    A batch is sequences with equally many neighbouring tokens, n, in the step.
    """

    keys: Tensor
    """[kv_heads, blocks, block_tokens, dk]."""
    values: Tensor
    """[kv_heads, blocks, block_tokens, dv]."""
    tables: Tensor
    """int64 [batch, table]: blocks of each sequence, padded with any valid block."""
    positions: Tensor
    """int64 [batch, n]: positions of the queries."""


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer scores keys."""

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """Visible keys, the token itself included; None for all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: Tensor | None = None
    """[heads]: extra logits that take probability and add no value."""


PagedAttend = Callable[[Tensor, PagedKV, AttentionOptions], Tensor]
"""(query [batch, heads, n, dk], strides free but the last; keys and values; options)
-> [batch, heads, n, dv] in the query's type. See `reference.attend`."""
