"""PrefixWriter: writes the keys and values that adapters have for positions before the prompt.

They are copied into the KV blocks of a sequence in place of rows that would compute them, so that
forwards run only rows to compute, and blocks of a prefix are shared and recomputed like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.engine.batch import Batch, Chunk
from adaplex.model.adapters.resident import ResidentAdapters
from adaplex.model.kv_cache import KVCache
from adaplex.model.tensors import int64_tensor
from adaplex.model.weights.adapter_weights import AdapterWeights

WriteKV = Callable[[int, Tensor, Tensor, Tensor], None]
"""(layer, slots [rows], key and value [kv_heads, rows, dim]): as `KVCache.write`."""


class PrefixWriter:
    """Writes prefixes, one position at a time or many."""

    def __init__(
        self,
        cache: KVCache,
        modules: Mapping[str, BaseModule],
        adapters: ResidentAdapters,
        write_kv: WriteKV,
    ) -> None:
        """`modules` are those of the base; `write_kv` writes in the layout of the forward."""
        self._block_tokens, self._device = cache.block_tokens, cache.keys[0].device
        self._attention = {m.name: m.layer for m in modules.values() if m.part == "attention"}
        self._adapters, self._write_kv = adapters, write_kv

    def write_prefix_kv(self, batch: Batch) -> Batch:
        """Writes the prefix positions of a batch; returns what is left to compute, perhaps no
        chunk.
        """
        if all(chunk.start >= chunk.sequence.leading for chunk in batch.chunks):
            return batch
        rest = map(self._write_chunk, batch.chunks)
        return Batch(tuple(chunk for chunk in rest if chunk.count))

    def _write_chunk(self, chunk: Chunk) -> Chunk:
        """Writes the prefix positions of a chunk; returns the chunk without them."""
        sequence = chunk.sequence
        if sequence.adapter is None or chunk.start >= sequence.leading:
            return chunk
        weights = self._adapters.weights(sequence.adapter)
        stop = min(chunk.end, max(chunk.start, weights.prefix_tokens))
        if chunk.start < stop:
            self._write(weights, sequence.blocks, chunk.start, stop)
        return Chunk(sequence, stop, chunk.end - stop)

    def _write(self, weights: AdapterWeights, blocks: list[int], start: int, stop: int) -> None:
        """Writes positions [start, stop) of a sequence with these blocks."""
        size = self._block_tokens
        slots = [blocks[at // size] * size + at % size for at in range(start, stop)]
        places = int64_tensor(slots, self._device)
        for name, layer in self._attention.items():
            site = weights.sites[name]
            assert site.keys is not None
            assert site.values is not None
            key, value = site.keys[start:stop], site.values[start:stop]
            self._write_kv(layer, places, key.transpose(0, 1), value.transpose(0, 1))


def panel_writer(cache: KVCache, unit: int) -> WriteKV:
    """Returns a WriteKV for a cache that the C decoder reads (see native/attention.h): in a block,
    keys lie as [dim / unit, tokens, unit] and values as [tokens / unit, dim, unit].
    """

    def write(layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        block, token = slots // cache.block_tokens, slots % cache.block_tokens
        keys, values = cache.keys[layer], cache.values[layer]
        heads, blocks, tokens, dim = keys.shape
        by_token = keys.view(heads, blocks, dim // unit, tokens, unit).transpose(2, 3)
        by_token[:, block, token] = key.unflatten(2, (-1, unit))
        heads, blocks, tokens, dim = values.shape
        by_token = values.view(heads, blocks, tokens // unit, dim, unit).transpose(3, 4)
        by_token[:, block, token // unit, token % unit] = torch.nan_to_num(value)

    return write
