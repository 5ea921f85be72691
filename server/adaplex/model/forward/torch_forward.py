"""TorchForward: steps of any architecture, by the modules of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate

from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import StepCosts
from adaplex.engine.sequence import VIRTUAL
from adaplex.model import measure_costs, select
from adaplex.model.adapters.prefix import WriteKV
from adaplex.model.adapters.resident import ResidentAdapters
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.decode_steps import DecodeSteps
from adaplex.model.forward.sampler import likeliest
from adaplex.model.forward.step_adapters import StepAdapters
from adaplex.model.kernels.reference import padded_rows
from adaplex.model.kv_cache import KVCache
from adaplex.model.progress import Progress
from adaplex.model.step.step_context import AdapterRows, AttentionGroup
from adaplex.model.step.tiles import AdapterKernels
from adaplex.model.tensors import int64_tensor


class TorchForward:
    """Fills the step context of a base and calls its modules. See Forward."""

    reads_panels = False
    int8_head_bytes = 0

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        adapters: ResidentAdapters,
        *,
        kernels: AdapterKernels | None,
        decode: DecodeSteps | None = None,
    ) -> None:
        """`kernels` do everything that adapters do, where there are such; `decode` runs the steps
        that it can.
        """
        self._base, self._step, self._cache = base, base.step, cache
        self._adapters, self._kernels, self._decode = adapters, kernels, decode
        self._low_rank = kernels or select.low_rank_kernel(base.kernels)
        modules = {name: index for index, name in enumerate(base.spec.modules)}
        self._step_adapters = StepAdapters(
            adapters, modules, base.device, low_rank=self._low_rank, kernels=kernels
        )
        self._step.cache = cache

    @property
    def write_kv(self) -> WriteKV:
        """See Forward."""
        return self._cache.write

    def __call__(self, batch: Batch, *, needs_logits: bool = True) -> tuple[Tensor, list[int]]:
        """See Forward. The logits are always computed."""
        logits = self._replayed(batch)
        if logits is None:
            logits = self._logits(batch)
        return logits, likeliest(logits)

    def warm_up(self, batch: Batch, progress: Progress) -> None:
        """See Forward. Compiles the kernels of adapters of any kind, and of products of other
        numbers of rows.
        """
        rows = self._step_adapters.every_launch()
        if rows is None:
            return
        progress("compiling the kernels of adapters")
        base = self._base
        for backend in base.backends.values():
            backend.warm_up(
                base.products.row_counts, base.dense_linear, dtype=base.dtype, device=base.device
            )
        self._logits(batch, rows)

    def step_costs(self) -> StepCosts:
        """See Forward."""
        base = self._base
        return measure_costs.measure(
            base.layer_backends,
            self._low_rank,
            dense=base.dense_linear,
            dtype=base.dtype,
            device=base.device,
        )

    def _replayed(self, batch: Batch) -> Tensor | None:
        if self._decode is None:
            return None
        return self._decode.forward(batch, self._adapters.unmerged)

    def _logits(self, batch: Batch, rows: AdapterRows | None = None) -> Tensor:
        """Returns logits as in Forward, by `rows` if given, else by the adapters of the batch."""
        chunks = batch.chunks
        tokens = [t for c in chunks for t in c.sequence.tokens[c.start : c.end]]
        virtual = {row: t - VIRTUAL for row, t in enumerate(tokens) if t >= VIRTUAL}
        for row in virtual:
            tokens[row] = 0
        positions = [p for c in chunks for p in range(c.start, c.end)]
        slots = [slot for c in chunks for slot in self._slots(c)]
        ends = accumulate(chunk.count for chunk in chunks)
        wanted = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        padding = padded_rows(len(tokens), select.min_rows(self._base.device)) - len(tokens)
        for column in (tokens, positions, slots):
            column.extend([0] * padding)
        wanted_padded = wanted + [0] * (padded_rows(len(wanted)) - len(wanted))

        step, device = self._step, self._base.device
        step.slots = int64_tensor(slots, device)
        step.groups = tuple(self._groups(chunks))
        step.rows = rows or self._step_adapters.rows(
            chunks, [c.count for c in chunks], padded=len(tokens), virtual=virtual
        )
        step.head_rows = rows or self._step_adapters.rows(
            batch.sampling, [1] * len(wanted), padded=len(wanted_padded), virtual={}
        )
        out = self._base.module(
            input_ids=int64_tensor([tokens], device),
            position_ids=int64_tensor([positions], device),
            use_cache=False,
            logits_to_keep=int64_tensor(wanted_padded, device),
        )
        logits: Tensor = out.logits[0, : len(wanted)]
        return logits.float()

    def _slots(self, chunk: Chunk) -> Iterator[int]:
        """Yields the slot of the cache of each token of the chunk."""
        size, blocks = self._cache.block_tokens, chunk.sequence.blocks
        for position in range(chunk.start, chunk.end):
            yield blocks[position // size] * size + position % size

    def _groups(self, chunks: Seq[Chunk]) -> Iterator[AttentionGroup]:
        """Yields the leading one-token chunks as one group, every longer chunk as its own."""
        ones = next((i for i, c in enumerate(chunks) if c.count > 1), len(chunks))
        if ones:
            yield self._group(0, chunks[:ones])
        row = ones
        for chunk in chunks[ones:]:
            yield self._group(row, [chunk])
            row += chunk.count

    def _group(self, row: int, chunks: Seq[Chunk]) -> AttentionGroup:
        """Returns the group of chunks of one length whose first row is `row`."""
        size, device = self._cache.block_tokens, self._base.device
        used = [c.sequence.blocks[: -(-c.end // size)] for c in chunks]
        width = max(map(len, used))
        tables = [blocks + [0] * (width - len(blocks)) for blocks in used]
        positions = [list(range(c.start, c.end)) for c in chunks]
        return AttentionGroup(row, int64_tensor(tables, device), int64_tensor(positions, device))
