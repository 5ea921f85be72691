"""Modelled machines for tests of merging: their step costs, and shares that merging changes."""

from __future__ import annotations

from collections.abc import Iterator

from adaplex.engine.batch import Chunk
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import AdapterMode
from adaplex.engine.sequence import Sequence
from engine.fakes import make_adapter, make_request

UNMERGED, MERGED, AUTO = AdapterMode.UNMERGED, AdapterMode.MERGED, AdapterMode.AUTO
ROWS = (1, 4, 8, 16, 32, 128)


def scaled(*milliseconds: float) -> tuple[float, ...]:
    return tuple(value * 1e-3 for value in milliseconds)


NF4_CPU = StepCosts(
    ROWS,
    scaled(3.8, 5.0, 7.0, 13.0, 28.0, 120.0),
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(0.3, 1.0, 2.0, 4.0, 6.0, 16.0),
    0.2e-3,
)
BF16_CPU = StepCosts(
    ROWS,
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(8.0, 9.0, 11.0, 18.0, 30.0, 95.0),
    scaled(0.3, 1.0, 2.0, 4.0, 6.0, 16.0),
    0.2e-3,
)
GPU = StepCosts(
    ROWS,
    scaled(1.0, 1.0, 1.1, 1.3, 1.8, 4.0),
    scaled(1.5, 1.5, 1.5, 1.5, 1.6, 2.0),
    scaled(0.9, 0.9, 0.9, 1.0, 1.1, 1.5),
    0.05e-3,
)
MACHINES = {"nf4 cpu": NF4_CPU, "bf16 cpu": BF16_CPU, "gpu": GPU}
DENSE = FoldedShare(100)
ZEROS = FoldedShare(100, dense=0.0, kept=1.0)
"""A QA-LoRA adapter on an int4-group base: it changes the zero points."""
FEW = FoldedShare(100, dense=0.25)
"""An adapter on a quarter of the linears."""


def chunks(name: str | None, mode: AdapterMode, rows: int) -> Iterator[Chunk]:
    """Yields decoding rows of an adapter, or of the base."""
    adapter = make_adapter(name, mode=mode) if name else None
    for _ in range(rows):
        yield Chunk(Sequence(make_request("r", [1], adapter)), 0, 1)
