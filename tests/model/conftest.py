"""Fixtures of the tests of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


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
