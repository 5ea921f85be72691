"""DecodeSteps: decoding steps whose inputs keep their addresses, so that a step can be replayed.

A step of a shape is a function of nothing but the shape's buffer, the KV cache, the arena and the
table of the adapters' kernels, all of which keep their addresses. Rows and block tables are rounded
up to powers of two, so there are few shapes. Which adapter a row has is a number in the buffer:
adapters may change between replays. A kernel is launched at every module where any adapter so far
needed it, so a step is captured again only for an adapter that touches another module, or in
another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaplex.adapters.limits import AdapterLimits
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.protocol import runs_of
from adaplex.model.kernels.reference import PARTITION
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows, AttentionGroup, BaseRows
from adaplex.model.step.tiles import AdapterKernels, Tile
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights

Replay = Callable[[], Tensor]
"""Runs one step on its buffer; logits [rows, vocabulary], valid until the next run."""
Capture = Callable[[Replay], Replay]
"""Makes a step that was never run into one that can be replayed; may run it on its buffer."""
WeightsOf = Callable[[str], AdapterWeights]
"""Digest -> resident adapter."""
BY_ROW = 3 + len(Tile._fields)
"""Numbers of a row besides its block table: token, position, slot, and a tile."""


def eager(step: Replay) -> Replay:
    """Captures nothing: every kernel is launched anew. A CUDA graph must give the same bits."""
    return step


class AdapterUse(Enum):
    """Kinds of changes that the adapters of a batch make."""

    NONE = auto()
    PLAIN = auto()
    """Low-rank deltas at linears."""
    ANY = auto()


@dataclass(frozen=True)
class Shape:
    """Sizes that a replay fixes."""

    rows: int
    blocks: int
    """Blocks in a row's table."""
    adapters: AdapterUse


class _Columns(NamedTuple):
    """Views of the numbers of a step, in a flat tensor or array."""

    tokens: Any
    """[rows]."""
    positions: Any
    """[rows]."""
    slots: Any
    """[rows]."""
    tiles: Any
    """[3, rows]: the columns are Tile; there are never more tiles than rows."""
    tables: Any
    """[rows, blocks]."""

    @staticmethod
    def size(shape: Shape) -> int:
        """Returns the elements of the flat tensor."""
        return shape.rows * (BY_ROW + shape.blocks)

    @classmethod
    def of(cls, flat: Any, shape: Shape) -> _Columns:
        """flat [size(shape)] of torch or numpy -> views of it."""
        rows = shape.rows
        by_row = flat[: BY_ROW * rows].reshape(BY_ROW, rows)
        tables = flat[BY_ROW * rows :].reshape(rows, shape.blocks)
        tokens, positions, slots = by_row[0], by_row[1], by_row[2]
        return cls(tokens, positions, slots, by_row[3:], tables)


class StepInputs:
    """The inputs of a step of one shape, as views into one tensor, so that one copy refills them.

    Padding rows hold token 0 at position 0 in the scratch block, and have no adapter.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._flat = torch.zeros(_Columns.size(shape), dtype=torch.int64, device=device)
        self._host = np.zeros(len(self._flat), np.int64)
        self._blocks: list[list[int]] = [[] for _ in range(shape.rows)]
        """Blocks in each row of the host's tables: few change from step to step."""
        self._columns = _Columns.of(self._host, shape)
        self.tokens, self.positions, self.slots, self.tiles, self.tables = _Columns.of(
            self._flat, shape
        )
        self.tiles[Tile._fields.index("slot")] = Tile.none().slot

    def fill(self, chunks: Sequence[Chunk], tiles: Sequence[Tile], block_tokens: int) -> None:
        """Copies the chunks of a batch, one token each, and their tiles."""
        columns, live = self._columns, len(chunks)
        rows = len(columns.tokens)
        for column in (columns.tokens, columns.positions, columns.slots):
            column[live:] = 0
        columns.tokens[:live] = [c.sequence.tokens[c.start] for c in chunks]
        columns.positions[:live] = [c.start for c in chunks]
        columns.slots[:live] = [
            c.sequence.blocks[c.start // block_tokens] * block_tokens + c.start % block_tokens
            for c in chunks
        ]
        columns.tiles[:] = np.array([*tiles, *[Tile.none()] * (rows - len(tiles))]).T
        used = [c.sequence.blocks[: c.start // block_tokens + 1] for c in chunks]
        for row, blocks in enumerate(used + [[]] * (rows - live)):
            if blocks != self._blocks[row]:
                columns.tables[row, : len(blocks)] = blocks
                columns.tables[row, len(blocks) :] = 0
                self._blocks[row] = blocks
        self._flat.copy_(torch.from_numpy(self._host))


class DecodeSteps:
    """Runs the batches that only decode, on one buffer for each shape."""

    def __init__(
        self,
        base: BaseModel,
        kernels: AdapterKernels,
        *,
        block_tokens: int,
        max_rank: int = AdapterLimits().max_rank,
        min_rows: int = 1,
        capture: Capture = eager,
    ) -> None:
        """Adapters of a rank above `max_rank` are not served. Fewer rows than `min_rows`, a power
        of two, are padded.
        """
        self._base = base
        self._kernels = kernels
        self._block_tokens = block_tokens
        self._max_rank, self._min_rows = max_rank, min_rows
        self._capture = capture
        self._launches = {use: LaunchPlan() for use in AdapterUse}
        """Launches that the adapters of batches so far needed."""
        self._replays: dict[Shape, _Step] = {}

    def forward(self, batch: Batch, weights: WeightsOf) -> Tensor | None:
        """Returns fp32 logits [rows, vocabulary]; None for a batch that is not served here: with
        prompts, merged adapters or ranks above the limit.
        """
        chunks = batch.chunks
        if not chunks or not all(c.count == 1 and c.samples for c in chunks):
            return None
        runs = self._runs(chunks, weights)
        if runs is None:
            return None
        tokens = max(c.end for c in chunks)
        shape = Shape(
            rows=max(self._min_rows, _power_of_two(len(chunks))),
            blocks=_power_of_two(-(-max(tokens, PARTITION) // self._block_tokens)),
            adapters=_use(runs),
        )
        tiles = self._kernels.tiles(runs)
        step = self._captured(shape, self._kernels.launches(runs))
        step.inputs.fill(chunks, tiles, self._block_tokens)
        return step.replay()[: len(chunks)].float()

    def _captured(self, shape: Shape, needed: LaunchPlan) -> _Step:
        """Returns the captured step of a shape; captures it again if it lacks needed launches."""
        step = self._replays.get(shape)
        if step is None or needed not in step.launches:
            launches = self._launches[shape.adapters] | needed
            self._launches[shape.adapters] = launches
            # New inputs are all padding: a capture may run the step, and must not write to blocks
            # that have other owners by now.
            inputs = StepInputs(shape, self._base.device)
            replay = self._capture(self._step(inputs, shape, launches))
            step = self._replays[shape] = _Step(inputs, launches, replay)
        return step

    def _step(self, inputs: StepInputs, shape: Shape, launches: LaunchPlan) -> Replay:
        """Returns the step of a shape, which reads `inputs`."""
        base, step = self._base, self._base.step
        adapters: AdapterRows = BaseRows()
        if shape.adapters is not AdapterUse.NONE:
            adapters = self._kernels.rows(inputs.tiles, launches, max_rank=self._max_rank)
        group = AttentionGroup(0, inputs.tables, inputs.positions[:, None])
        every_row = torch.arange(shape.rows, device=base.device)

        def run() -> Tensor:
            step.slots, step.groups = inputs.slots, (group,)
            step.rows = step.head_rows = adapters
            out = base.module(
                input_ids=inputs.tokens[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=every_row,
            )
            logits: Tensor = out.logits[0]
            return logits

        return run

    def _runs(self, chunks: Sequence[Chunk], weights: WeightsOf) -> list[AdapterRun] | None:
        """Returns the runs of a batch; None if one is merged or has a rank above the limit."""
        runs: list[AdapterRun] = []
        for adapter, start, stop in runs_of(chunks, [1] * len(chunks)):
            if adapter is None:
                continue
            if adapter.mode is AdapterMode.MERGED:
                return None
            found = weights(adapter.digest)
            if found.max_rank > self._max_rank:
                return None
            runs.append(AdapterRun(start, stop, found))
        return runs


@dataclass(frozen=True)
class _Step:
    """The captured step of a shape."""

    inputs: StepInputs
    launches: LaunchPlan
    replay: Replay


def _use(runs: Sequence[AdapterRun]) -> AdapterUse:
    """Returns the kind of changes of the adapters of these runs."""
    if not runs:
        return AdapterUse.NONE
    return AdapterUse.PLAIN if all(run.weights.plain for run in runs) else AdapterUse.ANY


def _power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
