"""Paged attention against plain softmax attention over the same keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaplex.model.kernels.paged_kv import AttentionOptions, PagedKV
from adaplex.model.kernels.reference import attend

BLOCK = 16


def plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [heads, n, d], keys and values [kv_heads, length, d] -> [heads, n, d]."""
    heads, n, _ = query.shape
    group = heads // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (query @ keys.transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(first, first + n)[:, None]
    columns = torch.arange(keys.shape[1])[None]
    hidden = columns > rows
    if window:
        hidden |= columns <= rows - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(heads, n, 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ values
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("lengths", [(1,), (15, 16, 17), (255, 256, 257), (700, 3)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"window": 20}, {"window": 300}, {"softcap": 3.0}, {"sinks": True}]
)
def test_paged_equals_plain(
    lengths: tuple[int, ...], n: int, heads: tuple[int, int], options: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    (h, kv_heads), d = heads, 8
    counts = [min(n, length) for length in lengths]
    n = min(counts)
    keys = torch.randn(kv_heads, 128, BLOCK, d, generator=generator)
    values = torch.randn(kv_heads, 128, BLOCK, d + 4, generator=generator)
    free = torch.randperm(127, generator=generator).add(1).tolist()
    width = -(-max(lengths) // BLOCK)
    tables = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        for column in range(-(-length // BLOCK)):
            tables[row, column] = free.pop()
    query = torch.randn(len(lengths), h, n, d, generator=generator)
    positions = torch.stack([torch.arange(length - n, length) for length in lengths])
    sinks = torch.randn(h, generator=generator) if options.get("sinks") else None
    window = int(options["window"]) if "window" in options else None
    softcap = options.get("softcap")

    kv = PagedKV(keys, values, tables, positions)
    got = attend(query, kv, AttentionOptions(0.3, window, softcap, sinks))
    for row, length in enumerate(lengths):
        k = keys[:, tables[row]].reshape(kv_heads, -1, d)[:, :length]
        v = values[:, tables[row]].reshape(kv_heads, -1, d + 4)[:, :length]
        expected = plain(
            query[row],
            k,
            v,
            length - n,
            scale=0.3,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        assert (got[row] - expected).abs().max() < 1e-5


def test_what_lies_in_masked_slots_changes_no_bit() -> None:
    keys, values = torch.randn(2, 40, BLOCK, 8), torch.randn(2, 40, BLOCK, 8)
    tables, positions = torch.tensor([[3, 7]]), torch.tensor([[18]])
    query = torch.randn(1, 4, 1, 8)
    kv, options = PagedKV(keys, values, tables, positions), AttentionOptions(1.0)
    before = attend(query, kv, options)
    keys[:, 7, 3:] = torch.nan
    values[:, 7, 3:] = 3e38
    keys[:, 0] = torch.inf
    after = attend(query, kv, options)
    assert torch.equal(before, after)
