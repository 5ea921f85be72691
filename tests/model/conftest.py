"""Fixtures of the tests of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from adaplex.model import select
from adaplex.model.kernels.native.kernels import NativeKernels

Array = NDArray[np.float32]


@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears multiply by Triton, as on a CUDA device."""
    products = select.products(torch.device("cuda"))
    monkeypatch.setattr(select, "products", lambda _: products)


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes interpreted products independent of a row's place in its tile, as they are on a GPU:
    the interpreter multiplies with BLAS, which sums some rows of a tile in another order."""
    _multiply_by(monkeypatch, lambda a, b: np.stack([row @ b for row in a]))


@pytest.fixture
def element_by_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like `row_by_row`, for products in which rows are columns: independent of both places, and of
    how many there are."""

    def product(a: Array, b: Array) -> Array:
        columns = np.ascontiguousarray(b.T)
        return np.stack([(row * columns).sum(-1) for row in a])

    _multiply_by(monkeypatch, product)


def _multiply_by(monkeypatch: pytest.MonkeyPatch, product: Callable[[Array, Array], Array]) -> None:
    if torch.cuda.is_available():
        return

    def dot(_: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *__: Any) -> TensorHandle:
        assert a.data.dtype == b.data.dtype == np.float32
        return TensorHandle(product(a.data, b.data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes interpreted kernels round to bf16 as they do on a GPU: the interpreter cuts off."""
    cast = InterpreterBuilder.cast_impl

    def create_fp_trunc(self: Any, src: TensorHandle, to: Any) -> TensorHandle:
        if (src.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, to)
        bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


@pytest.fixture
def use_threads() -> Iterator[Callable[[NativeKernels, int], None]]:
    """Sets the number of threads of a library's team, until the test ends."""
    used: list[NativeKernels] = []

    def use(kernels: NativeKernels, count: int) -> None:
        used.append(kernels)
        assert kernels.use_threads(count) == count

    yield use
    for kernels in used:
        kernels.use_threads(1)
