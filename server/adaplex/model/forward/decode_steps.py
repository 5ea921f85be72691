"""DecodeSteps: decoding steps whose inputs stay in place, so that one can be replayed.

A step of a shape is a function of nothing but the shape's buffer, the KV cache, the arena and the
table of the adapters' kernels, all of which keep their addresses. Rows and block tables are rounded
up to powers of two, so there are few shapes. Which adapter a row has is a number in the buffer:
adapters may change between replays. Kernels are launched where any adapter so far had something, so
that a replay is made anew only when one comes that touches another module, or in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from adaplex.adapters.limits import AdapterLimits
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.protocol import runs_of
from adaplex.model.kernels.reference import PARTITION, least_rows
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows, AttentionGroup, BaseRows
from adaplex.model.step.tiles import AdapterKernels, Tile
from adaplex.model.weights.adapter_weights import AdapterWeights, LowRankKernel, Span

Replay = Callable[[], Tensor]
"""Runs one step on what its buffer holds; logits [rows, vocabulary], valid until the next run."""
Capture = Callable[[Replay], Replay]
"""Makes a step that was never run into one that can be replayed; may run it on what is there."""
Weights = Callable[[str], AdapterWeights]
"""Digest -> resident adapter."""


def eager(step: Replay) -> Replay:
    """Launches every kernel anew: what a CUDA graph of the step has to equal."""
    return step


class Adapters(Enum):
    """What the adapters of a batch do."""

    NOTHING = auto()
    PLAIN = auto()
    """Low-rank deltas at linears."""
    ANYTHING = auto()


@dataclass(frozen=True)
class Shape:
    """What a replay fixes: rows, blocks in a row's table, and what adapters may do."""

    rows: int
    blocks: int
    adapters: Adapters


class StepInputs:
    """The inputs of a step of one shape, as views into one tensor, so that one copy refills them.

    Padding rows hold token 0 at position 0 in the scratch block, and have no adapter.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        rows = shape.rows
        self._shape = shape
        self._flat = torch.zeros(rows * (6 + shape.blocks), dtype=torch.int64, device=device)
        self._host = np.zeros(len(self._flat), np.int64)
        self._used: list[list[int]] = [[] for _ in range(rows)]
        """The blocks that each row of the host's tables has: few change from step to step."""
        by_row, tables = self._flat.split((6 * rows, rows * shape.blocks))
        self.tokens, self.positions, self.slots = by_row.view(6, rows)[:3]
        """[rows] each."""
        self.tiles = by_row.view(6, rows)[3:]
        """[3, rows]: the columns are Tile; a row's worth of tiles always suffices."""
        self.tables = tables.view(rows, shape.blocks)
        self.tiles[0] = Tile.none().slot

    def fill(self, chunks: Sequence[Chunk], tiles: Sequence[Tile], block_tokens: int) -> None:
        """Takes in the chunks of a batch, one token each, and their tiles."""
        rows, live = self._shape.rows, len(chunks)
        by_row = self._host[: 6 * rows].reshape(6, rows)
        tables = self._host[6 * rows :].reshape(rows, -1)
        by_row[:3, live:] = 0
        by_row[0, :live] = [c.sequence.tokens[c.start] for c in chunks]
        by_row[1, :live] = [c.start for c in chunks]
        by_row[2, :live] = [
            c.sequence.blocks[c.start // block_tokens] * block_tokens + c.start % block_tokens
            for c in chunks
        ]
        by_row[3:] = np.array([*tiles, *[Tile.none()] * (rows - len(tiles))]).T
        used = [c.sequence.blocks[: c.start // block_tokens + 1] for c in chunks]
        for row, blocks in enumerate(used + [[]] * (rows - live)):
            if blocks != self._used[row]:
                tables[row, : len(blocks)] = blocks
                tables[row, len(blocks) :] = 0
                self._used[row] = blocks
        self._flat.copy_(torch.from_numpy(self._host))


class DecodeSteps:
    """Runs the batches that only decode, on buffers that are made once a shape."""

    def __init__(
        self,
        base: BaseModel,
        kernels: AdapterKernels,
        *,
        block_tokens: int,
        max_rank: int = AdapterLimits().max_rank,
        least_rows: int = 1,
        capture: Capture = eager,
    ) -> None:
        """`max_rank` bounds the adapters that are served; those above it take the other path. Fewer
        rows than `least_rows`, a power of two, are padded.
        """
        self._base = base
        self._kernels = kernels
        self._block_tokens = block_tokens
        self._max_rank, self._least_rows = max_rank, least_rows
        self._capture = capture
        self._launches = {adapters: LaunchPlan() for adapters in Adapters}
        """Where adapters of batches so far had something."""
        self._replays: dict[Shape, _Step] = {}

    def forward(self, batch: Batch, weights: Weights) -> Tensor | None:
        """fp32 logits [rows, vocabulary]; None for a batch that needs the runner's other path:
        prompts, merged adapters, ranks above the limit.
        """
        chunks = batch.chunks
        if not chunks or not all(c.count == 1 and c.samples for c in chunks):
            return None
        spans = self._spans(chunks, weights)
        if spans is None:
            return None
        tokens = max(c.end for c in chunks)
        shape = Shape(
            rows=max(self._least_rows, _power_of_two(len(chunks))),
            blocks=_power_of_two(-(-max(tokens, PARTITION) // self._block_tokens)),
            adapters=_do(spans),
        )
        tiles = self._kernels.tiles(spans)
        made = self._made(shape, self._kernels.launches(spans))
        made.inputs.fill(chunks, tiles, self._block_tokens)
        return made.replay()[: len(chunks)].float()

    def _made(self, shape: Shape, needed: LaunchPlan) -> _Step:
        """The step of a shape that launches what is needed, if not more."""
        made = self._replays.get(shape)
        if made is None or needed not in made.launches:
            launches = self._launches[shape.adapters] | needed
            self._launches[shape.adapters] = launches
            # Of padding alone: a capture may run the step, and blocks may be another's by now.
            inputs = StepInputs(shape, self._base.device)
            replay = self._capture(self._step(inputs, shape, launches))
            made = self._replays[shape] = _Step(inputs, launches, replay)
        return made

    def _step(self, inputs: StepInputs, shape: Shape, launches: LaunchPlan) -> Replay:
        """The step of a shape."""
        base, step = self._base, self._base.step
        adapters: AdapterRows = BaseRows()
        if shape.adapters is not Adapters.NOTHING:
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

    def _spans(self, chunks: Sequence[Chunk], weights: Weights) -> list[Span] | None:
        """Rows by adapter; None when an adapter is merged or has a rank above the limit."""
        spans: list[Span] = []
        for adapter, start, stop in runs_of(chunks, [1] * len(chunks)):
            if adapter is None:
                continue
            if adapter.mode is AdapterMode.MERGED:
                return None
            found = weights(adapter.digest)
            if found.max_rank > self._max_rank:
                return None
            spans.append(Span(start, stop, found))
        return spans


@dataclass(frozen=True)
class _Step:
    """What is kept of a shape."""

    inputs: StepInputs
    launches: LaunchPlan
    replay: Replay


def _do(spans: Sequence[Span]) -> Adapters:
    """What the adapters of these spans do."""
    if not spans:
        return Adapters.NOTHING
    plain = all(span.weights.plain for span in spans)
    return Adapters.PLAIN if plain else Adapters.ANYTHING


def decode_steps(
    base: BaseModel, low_rank: LowRankKernel, *, block_tokens: int, capture: Capture = eager
) -> DecodeSteps | None:
    """For kernels that read their tiles on the device; None for the others."""
    if not isinstance(low_rank, AdapterKernels):
        return None
    return DecodeSteps(
        base,
        low_rank,
        block_tokens=block_tokens,
        least_rows=least_rows(base.device),
        capture=capture,
    )


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
