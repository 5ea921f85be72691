"""Huge pages: tensors that share chunks do not overlap, are aligned, and keep their chunk alive."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from adaplex.model import huge_pages


def test_small_tensors_share_pages_but_no_byte() -> None:
    with huge_pages.shared_chunks():
        shapes = [(3, 5), (1,), (1000, 7), (64,), (2, 2, 2)]
        tensors = [huge_pages.empty(*shape, dtype=torch.float32) for shape in shapes]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(start % huge_pages.LINE == 0 for start, _ in places)
    assert places[-1][1] - places[0][0] < huge_pages.CHUNK
    for value, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert bool((tensor == value).all())


def test_a_tensor_outlives_those_of_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "CHUNK", 1 << 16)
    with huge_pages.shared_chunks():
        first, *others = (huge_pages.empty(4000, dtype=torch.float32) for _ in range(12))
    first.fill_(7)
    del others
    gc.collect()
    assert bool((first == 7).all())


def test_large_and_empty_tensors_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "CHUNK", 1 << 12)
    with huge_pages.shared_chunks():
        large = huge_pages.empty(1 << 14, dtype=torch.bfloat16)
        none = huge_pages.empty(0, 3, dtype=torch.bfloat16)
    large.fill_(1)
    assert none.shape == (0, 3)
    assert float(large.float().sum()) == 1 << 14
