"""TorchForward: steps of any architecture, by the modules of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode
from adaplex.engine.sequence import VIRTUAL
from adaplex.model.adapters.fold import FoldedWeights
from adaplex.model.adapters.torch_rows import Segment, TorchRows
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.decode_steps import DecodeSteps
from adaplex.model.forward.protocol import runs_of
from adaplex.model.forward.sampler import likeliest
from adaplex.model.huge_pages import whole_numbers
from adaplex.model.kernels.reference import least_rows, padded_rows
from adaplex.model.kv_cache import KVCache
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows, AttentionGroup, BaseRows
from adaplex.model.step.tiles import AdapterKernels, Tile
from adaplex.model.weights.adapter_weights import AdapterWeights, LowRankKernel, Span


class TorchForward:
    """Fills the step context of a base and calls its modules."""

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        *,
        low_rank: LowRankKernel,
        decode: DecodeSteps | None,
        weights: Callable[[str], AdapterWeights],
        merged: Mapping[str, FoldedWeights],
    ) -> None:
        """`weights` gives a resident adapter by digest; `decode` takes the steps it serves."""
        self._base, self._step, self._block_tokens = base, base.step, cache.block_tokens
        self._low_rank, self._decode = low_rank, decode
        self._weights, self._merged = weights, merged
        self._modules = {name: index for index, name in enumerate(base.spec.modules)}
        self._step.cache = cache

    def __call__(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """See Forward."""
        logits = self._replayed(batch)
        if logits is None:
            logits = self._logits(batch)
        return logits, likeliest(logits)

    def warm_up(self, batch: Batch, progress: Callable[[str], None]) -> None:
        """Compiles what steps may launch and the base's own do not: the kernels of adapters of any
        kind, and of products of other numbers of rows. Runs the batch, in which no row has an
        adapter; nothing that later steps see changes but what it writes to the cache.
        """
        kernels, device = self._low_rank, self._base.device
        if not isinstance(kernels, AdapterKernels):
            return
        progress("compiling the kernels of adapters")
        for backend in self._base.backends.values():
            backend.warm_up(self._base.dtype, device)
        tiles = whole_numbers([Tile.none()], device).T.contiguous()
        launches = LaunchPlan.everywhere(len(self._modules))
        self._logits(batch, kernels.rows(tiles, launches, max_rank=1))

    def _replayed(self, batch: Batch) -> Tensor | None:
        return None if self._decode is None else self._decode.forward(batch, self._weights)

    def _logits(self, batch: Batch, rows: AdapterRows | None = None) -> Tensor:
        """By `rows` instead of what the adapters of the batch do, if given."""
        chunks = batch.chunks
        tokens = [t for c in chunks for t in c.sequence.tokens[c.start : c.end]]
        virtual = {row: t - VIRTUAL for row, t in enumerate(tokens) if t >= VIRTUAL}
        for row in virtual:
            tokens[row] = 0
        positions = [p for c in chunks for p in range(c.start, c.end)]
        slots = [slot for c in chunks for slot in self._slots(c)]
        ends = accumulate(chunk.count for chunk in chunks)
        wanted = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        padding = padded_rows(len(tokens), least_rows(self._base.device)) - len(tokens)
        for column in (tokens, positions, slots):
            column.extend([0] * padding)
        wanted_padded = wanted + [0] * (padded_rows(len(wanted)) - len(wanted))

        step, device = self._step, self._base.device
        step.slots = whole_numbers(slots, device)
        step.groups = tuple(self._groups(chunks))
        step.rows = rows or self._adapter_rows(
            chunks, [c.count for c in chunks], len(tokens), virtual
        )
        step.head_rows = rows or self._adapter_rows(
            batch.sampling, [1] * len(wanted), len(wanted_padded), {}
        )
        out = self._base.module(
            input_ids=whole_numbers([tokens], device),
            position_ids=whole_numbers([positions], device),
            use_cache=False,
            logits_to_keep=whole_numbers(wanted_padded, device),
        )
        logits: Tensor = out.logits[0, : len(wanted)]
        return logits.float()

    def _slots(self, chunk: Chunk) -> Iterator[int]:
        """Where in the cache each token of the chunk goes."""
        size, blocks = self._block_tokens, chunk.sequence.blocks
        for position in range(chunk.start, chunk.end):
            yield blocks[position // size] * size + position % size

    def _groups(self, chunks: Seq[Chunk]) -> Iterator[AttentionGroup]:
        """Leading one-token chunks together, every longer chunk by itself."""
        ones = next((i for i, c in enumerate(chunks) if c.count > 1), len(chunks))
        if ones:
            yield self._group(0, chunks[:ones])
        row = ones
        for chunk in chunks[ones:]:
            yield self._group(row, [chunk])
            row += chunk.count

    def _group(self, row: int, chunks: Seq[Chunk]) -> AttentionGroup:
        """A group of chunks of one length that starts at `row`."""
        size, device = self._block_tokens, self._base.device
        used = [c.sequence.blocks[: -(-c.end // size)] for c in chunks]
        width = max(map(len, used))
        tables = [blocks + [0] * (width - len(blocks)) for blocks in used]
        positions = [list(range(c.start, c.end)) for c in chunks]
        return AttentionGroup(row, whole_numbers(tables, device), whole_numbers(positions, device))

    def _adapter_rows(
        self, chunks: Seq[Chunk], counts: Seq[int], padded: int, virtual: Mapping[int, int]
    ) -> AdapterRows:
        """Which adapter changes which rows; neighbouring rows of one adapter go together.

        One that has all rows gets the padding too, up to row `padded`. `virtual` has the rows of
        positions before the prompt, and which they are.
        """
        changes: list[_Change] = []
        rows = sum(counts)
        for adapter, start, end in runs_of(chunks, counts):
            if adapter is None:
                continue
            stop = padded if (start, end) == (0, rows) else end
            linears: Mapping[str, LinearBackend] = {}
            if adapter.mode is AdapterMode.MERGED:
                merged = self._merged[adapter.digest]
                weights, linears = merged.rest, merged.linears
            else:
                weights = self._weights(adapter.digest)
            leading = tuple(
                (row, virtual[row] - weights.prefix_tokens)
                for row in range(start, end)
                if row in virtual
            )
            changes.append(_Change(Span(start, stop, weights), linears, leading))
        if not changes:
            return BaseRows()
        if isinstance(self._low_rank, AdapterKernels):
            return self._kernel_rows(self._low_rank, changes, padded)
        segments = [c.segment for c in changes if c.linears or not c.span.weights.plain]
        spans = [c.span for c in changes if not c.linears]
        if not spans:
            return TorchRows(segments)
        return TorchRows(segments, self._low_rank.plan(spans, self._modules))

    def _kernel_rows(
        self, kernels: AdapterKernels, changes: Seq[_Change], padded: int
    ) -> AdapterRows:
        """By kernels alone but for the products of merged weights."""
        device, spans = self._base.device, [c.span for c in changes]
        tiles = whole_numbers(kernels.tiles(spans), device).T.contiguous()
        leading = dict(pair for c in changes for pair in c.leading)
        virtual = [leading.get(row, -1) for row in range(padded)]
        merged = TorchRows([c.segment for c in changes if c.linears])
        return kernels.rows(
            tiles,
            kernels.launches(spans),
            max_rank=max(span.weights.max_rank for span in spans),
            virtual=whole_numbers(virtual, device) if leading else None,
            product=merged.product,
        )


@dataclass(frozen=True)
class _Change:
    """What an adapter does to its rows, as in Segment."""

    span: Span
    linears: Mapping[str, LinearBackend]
    leading: tuple[tuple[int, int], ...]

    @property
    def segment(self) -> Segment:
        """For torch."""
        span = self.span
        return Segment(span.start, span.stop, span.weights.sites, self.linears, self.leading)
