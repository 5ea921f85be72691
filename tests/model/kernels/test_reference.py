"""Reference products: right, and of the same bits for a row alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from adaplex.model.kernels.reference import ROW_TILE, batch_product, linear_rows

ROWS = 203
SHAPES = [(2, 3), (16, 3), (64, 9), (8, 8), (32, 256), (576, 8), (300, 65), (1536, 96)]
"""(inner, out): narrow ones, and sums that BLAS cuts."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_a_linear_has_the_same_bits_alone_and_in_a_batch(
    shape: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    inner, out = shape
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(ROWS, inner, generator=generator).to(dtype)
    weight = torch.randn(out, inner, generator=generator).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
    alone = torch.cat([linear_rows(x[i : i + 1], weight) for i in range(ROWS)])
    exact = x.double() @ weight.double().T
    relative = 1e-5 if dtype is torch.float32 else 1e-2
    assert (alone - exact).abs().max() < relative * exact.abs().max()
    for rows in (2, 4, 7, 16, 33, 64, ROWS):
        assert torch.equal(linear_rows(x[:rows], weight), alone[:rows])


@pytest.mark.parametrize("inner", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_a_batch_have_the_same_bits_among_any_number_of_rows(
    inner: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(5, 160, inner, generator=generator).to(dtype)
    y = torch.randn(5, inner, 64, generator=generator).to(dtype)
    tile = batch_product(x[:1, :ROW_TILE], y[:1])
    exact = x[:1, :ROW_TILE].double() @ y[:1].double()
    relative = 1e-5 if dtype is torch.float32 else 1e-2
    assert (tile - exact).abs().max() < relative * exact.abs().max()
    for rows in range(ROW_TILE, 161, ROW_TILE):
        assert torch.equal(batch_product(x[:, :rows], y)[:1, :ROW_TILE], tile)
