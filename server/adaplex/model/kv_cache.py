"""KVCache: paged keys and values, head-major."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.model import huge_pages


@dataclass(frozen=True)
class LayerShape:
    """Sizes of what one attention layer stores for a token."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Elements a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVCache:
    """Keys and values of every layer, [kv_heads, blocks, block_tokens, dim] each.

    Block 0 is scratch: padding rows write there, and it is only read where it is masked.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens

        def zeros(heads: int, dim: int) -> Tensor:
            shape = (heads, num_blocks, block_tokens, dim)
            return huge_pages.empty(*shape, dtype=dtype, device=device).zero_()

        self.keys = [zeros(s.kv_heads, s.key_dim) for s in shapes]
        self.values = [zeros(s.kv_heads, s.value_dim) for s in shapes]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores the rows of a step: slots [rows], key and value [kv_heads, rows, dim].

        Infinities and NaN of values are made finite: a masked key has weight zero, and zero times
        NaN would carry one tenant's overflow into the next owner of the block.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.view(keys.shape[0], -1, keys.shape[3]).index_copy_(1, slots, key)
        values.view(values.shape[0], -1, values.shape[3]).index_copy_(
            1, slots, torch.nan_to_num(value)
        )
