"""Fixtures of the tests of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from adaplex.model.kernels.native.kernels import NativeKernels


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes interpreted products independent of a row's place in its tile, as they are on a GPU:
    the interpreter multiplies with BLAS, which sums some rows of a tile in another order."""
    if torch.cuda.is_available():
        return

    def dot(_: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *__: Any) -> TensorHandle:
        assert a.data.dtype == b.data.dtype == np.float32
        product = np.stack([row @ b.data for row in a.data])
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def use_threads() -> Iterator[Callable[[NativeKernels, int], None]]:
    """Makes the team of a library some threads strong, until the test ends."""
    used: list[NativeKernels] = []

    def use(kernels: NativeKernels, count: int) -> None:
        used.append(kernels)
        assert kernels.use_threads(count) == count

    yield use
    for kernels in used:
        kernels.use_threads(1)
