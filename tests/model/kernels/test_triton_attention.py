"""Triton's paged attention against the reference. On the GPU, or interpreted on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.kernels.paged_kv import AttentionOptions, PagedKV
from adaplex.model.kernels.triton import attention as triton_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 16
BLOCKS = 160
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest error by dtype; for bf16 two roundings of values of the results' size."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "long-window": {"window": 300, "softcap": 3.0},
    "sinks": {"sinks": True, "softcap": 50.0},
}


class Paged:
    """Sequences of these lengths in shuffled blocks, and a query of the last n tokens."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        n: int,
        heads: tuple[int, int] = (6, 2),
        dims: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        random = torch.Generator().manual_seed(sum(lengths) + n)
        self.random, (h, kv_heads), (dk, dv) = random, heads, dims

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype).to(DEVICE)

        self.keys, self.values = (
            normal(kv_heads, BLOCKS, BLOCK, dk),
            normal(kv_heads, BLOCKS, BLOCK, dv),
        )
        free = torch.randperm(BLOCKS - 1, generator=random).add(1).tolist()
        tables = torch.zeros(len(lengths), -(-max(lengths) // BLOCK), dtype=torch.int64)
        for row, length in enumerate(lengths):
            for column in range(-(-length // BLOCK)):
                tables[row, column] = free.pop()
        self.tables = tables.to(DEVICE)
        self.positions = torch.stack([torch.arange(length - n, length) for length in lengths]).to(
            DEVICE
        )
        # The layout of attention layers: heads first, the rows of all sequences together.
        self.query = normal(h, len(lengths), n, dk).transpose(0, 1)
        self.sinks = normal(h)

    def options(self, name: str) -> AttentionOptions:
        options = dict(OPTIONS[name])
        if options.get("sinks"):
            options["sinks"] = self.sinks
        return AttentionOptions(0.3, **options)

    def attend(self, name: str, rows: slice = slice(None), tokens: slice = slice(None)) -> Tensor:
        kv = PagedKV(
            self.keys,
            self.values,
            self.tables[rows],
            self.positions[rows, tokens].contiguous(),
        )
        return triton_attention.attend(self.query[rows, :, tokens], kv, self.options(name))

    def expected(self, name: str) -> Tensor:
        kv = PagedKV(self.keys, self.values, self.tables, self.positions)
        return reference.attend(self.query, kv, self.options(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", sorted(OPTIONS))
@pytest.mark.parametrize("n", [1, 3, 33])
def test_equals_the_reference(n: int, options: str, dtype: torch.dtype) -> None:
    paged = Paged((n, 255 + n, 700), n, dtype=dtype)
    error = (paged.attend(options).float() - paged.expected(options).float()).abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [((3, 1), (64, 64)), ((4, 4), (8, 12)), ((20, 1), (80, 96)), ((2, 1), (128, 128))],
)
def test_heads_and_sizes_of_any_number(
    heads: tuple[int, int], dims: tuple[int, int], n: int
) -> None:
    paged = Paged((9, 257), n, heads, dims)
    assert (paged.attend("plain") - paged.expected("plain")).abs().max() < 2e-5


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("options", sorted(OPTIONS))
def test_a_decoding_row_has_the_same_bits_alone_and_in_a_batch(options: str) -> None:
    paged = Paged((1, 256, 700, 257), 1, dtype=torch.bfloat16)
    together = paged.attend(options)
    for row in range(4):
        assert torch.equal(paged.attend(options, slice(row, row + 1))[0], together[row])


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("options", sorted(OPTIONS))
def test_a_prompt_row_has_the_same_bits_in_any_chunk(options: str) -> None:
    paged = Paged((300,), 60, heads=(4, 2))
    whole = paged.attend(options)
    for start, stop in ((0, 7), (7, 40), (25, 60), (58, 60)):
        part = paged.attend(options, tokens=slice(start, stop))
        assert torch.equal(part, whole[:, :, start:stop])


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("options", sorted(OPTIONS))
def test_both_kernels_give_a_row_the_same_figures(options: str) -> None:
    paged = Paged((300,), 40, heads=(4, 2))
    whole = paged.attend(options)
    for token in (0, 17, 39):
        alone = paged.attend(options, tokens=slice(token, token + 1))
        assert (alone - whole[:, :, token : token + 1]).abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("options", ["plain", "window"])
def test_what_others_own_changes_no_bit(options: str, n: int) -> None:
    paged = Paged((40, 290), n)
    before = paged.attend(options)
    owned = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool)
    for row, length in enumerate((40, 290)):
        for position in range(length):
            owned[int(paged.tables[row, position // BLOCK]) * BLOCK + position % BLOCK] = True
    for cache in (paged.keys, paged.values):
        cache.view(cache.shape[0], -1, cache.shape[3])[:, ~owned] = torch.nan
    assert torch.isfinite(before).all()
    assert torch.equal(paged.attend(options), before)


@pytest.mark.parametrize("options", ["window", "long-window"])
def test_what_left_the_window_changes_no_bit(options: str) -> None:
    paged = Paged((700,), 1)
    before = paged.attend(options)
    for cache in (paged.keys, paged.values):
        cache[:, paged.tables[0, : (700 - 300) // BLOCK]] = torch.nan
    assert torch.equal(paged.attend(options), before)


def test_a_table_that_is_too_wide_changes_no_bit() -> None:
    paged = Paged((300, 17), 1)
    before = paged.attend("plain")
    paged.tables = torch.nn.functional.pad(paged.tables, (0, 64 - paged.tables.shape[1]))
    assert torch.equal(paged.attend("plain"), before)
