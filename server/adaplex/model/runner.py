"""ModelRunner: the engine's Runner on torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate, groupby

import torch
from torch import Tensor

from adaplex.adapters.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.cost_model import StepCosts
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SampledToken, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model import costs
from adaplex.model.adapted import AdaptedLinear
from adaplex.model.arena import Arena
from adaplex.model.host_copies import HostCopies, PackedAdapter, pack
from adaplex.model.kernels.low_rank import LowRankKernel, ReferenceLowRank, Span
from adaplex.model.kernels.reference import padded_rows
from adaplex.model.kv_cache import KVCache
from adaplex.model.loader import BaseModel
from adaplex.model.merged import MergedWeights, merge, merged_bytes
from adaplex.model.sampler import sample
from adaplex.model.step import AdapterRows, AttentionGroup, Segment


class ModelRunner:
    """Runs batches on a loaded base with the adapters in its arena."""

    def __init__(
        self,
        base: BaseModel,
        *,
        num_blocks: int,
        block_tokens: int,
        arena_bytes: int,
        load_program: Callable[[str], AdapterProgram],
        low_rank: LowRankKernel | None = None,
    ) -> None:
        """`load_program` lowers a stored adapter; `low_rank` is by default the reference."""
        self._base = base
        self._step = base.step
        self._load_program = load_program
        self._block_tokens = block_tokens
        self._low_rank = low_rank or ReferenceLowRank()
        self._modules = {name: index for index, name in enumerate(base.spec.modules)}
        self._arena = Arena(arena_bytes, self._modules, dtype=base.dtype, device=base.device)
        self._host = HostCopies()
        self._merged: dict[str, MergedWeights] = {}
        self._step.cache = KVCache(
            base.shapes,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            dtype=base.dtype,
            device=base.device,
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> Seq[SampledToken]:
        """One step; see Runner."""
        sampling = batch.sampling
        logits = self.forward(batch)
        return sample(logits, [chunk.sequence for chunk in sampling]) if sampling else []

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Runs the chunks of a batch; fp32 logits [len(batch.sampling), vocabulary]."""
        chunks = batch.chunks
        tokens = [t for c in chunks for t in c.sequence.tokens[c.start : c.end]]
        positions = [p for c in chunks for p in range(c.start, c.end)]
        slots = [slot for c in chunks for slot in self._slots(c)]
        ends = accumulate(chunk.count for chunk in chunks)
        wanted = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        padding = padded_rows(len(tokens)) - len(tokens)
        for column in (tokens, positions, slots):
            column.extend([0] * padding)
        wanted_padded = wanted + [0] * (padded_rows(len(wanted)) - len(wanted))

        step, device = self._step, self._base.device
        step.slots = torch.tensor(slots, device=device)
        step.groups = tuple(self._groups(chunks))
        step.rows = self._adapter_rows(chunks, [c.count for c in chunks], len(tokens))
        step.head_rows = self._adapter_rows(batch.sampling, [1] * len(wanted), len(wanted_padded))
        out = self._base.module(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted_padded, device=device),
        )
        logits: Tensor = out.logits[0, : len(wanted)]
        return logits.float()

    def warm_up(self) -> None:
        """Runs a prompt and one decoding row once, in the scratch block, so that the first request
        pays for no lazy initialisation.
        """
        sequence = Sequence(Request("warm-up", (0,) * self._block_tokens, SamplingParams()))
        sequence.blocks = [0]
        last = self._block_tokens - 1
        self.run(Batch((Chunk(sequence, 0, self._block_tokens),)))
        self.run(Batch((Chunk(sequence, last, 1),)))

    @torch.inference_mode()
    def step_costs(self) -> StepCosts:
        """See Runner."""
        linears = {
            module.name: module.backend
            for module in self._base.module.modules()
            if isinstance(module, AdaptedLinear) and not module.is_head
        }
        base = self._base
        return costs.measure(linears, self._low_rank, dtype=base.dtype, device=base.device)

    def fetch_adapter(self, digest: str) -> None:
        """See Runner."""
        self._host.keep(self._packed(digest))

    def remove_host(self, digest: str) -> None:
        """See Runner."""
        self._host.remove(digest)

    def load_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        """See Runner."""
        packed = self._host.get(digest) or self._packed(digest)
        self._arena.load(packed, offset, nbytes)

    def remove_adapter(self, digest: str) -> None:
        """See Runner."""
        self._arena.remove(digest)

    @torch.inference_mode()
    def build_merged(self, digest: str) -> int:
        """See Runner."""
        base, program = self._base, self._load_program(digest)
        self._merged[digest] = merge(program, base.backends, dtype=base.dtype, device=base.device)
        return merged_bytes(program, base.backends, base.dtype)

    def merged_bytes(self, digest: str) -> int:
        """See Runner."""
        return merged_bytes(self._load_program(digest), self._base.backends, self._base.dtype)

    def remove_merged(self, digest: str) -> None:
        """See Runner."""
        del self._merged[digest]

    def _packed(self, digest: str) -> PackedAdapter:
        pinned = self._base.device.type == "cuda"
        return pack(self._load_program(digest), self._base.dtype, pinned=pinned)

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
        return AttentionGroup(
            row, torch.tensor(tables, device=device), torch.tensor(positions, device=device)
        )

    def _adapter_rows(self, chunks: Seq[Chunk], counts: Seq[int], padded: int) -> AdapterRows:
        """Which adapter changes which rows; neighbouring rows of one adapter go together.

        One that has all rows gets the padding too, up to row `padded`.
        """
        spans: list[Span] = []
        segments: list[Segment] = []
        rows = sum(counts)
        for adapter, start, end in _neighbours(chunks, counts):
            stop = padded if (start, end) == (0, rows) else end
            if adapter.mode is AdapterMode.MERGED:
                merged = self._merged[adapter.digest]
                segments.append(Segment(start, stop, merged.sites, merged.linears))
                continue
            weights = self._arena.weights(adapter.digest)
            spans.append(Span(start, stop, weights))
            if weights.has_bias:
                segments.append(Segment(start, stop, weights.sites))
        if not spans:
            return AdapterRows(any=bool(segments), segments=tuple(segments))
        add = self._low_rank.plan(spans, self._modules)
        return AdapterRows(any=True, add_low_rank=add, segments=tuple(segments))


def _neighbours(chunks: Seq[Chunk], counts: Seq[int]) -> Iterator[tuple[AdapterRef, int, int]]:
    """(adapter, first row, row after the last) of each run of rows with one adapter and mode."""
    row = 0
    pairs = zip(chunks, counts, strict=True)
    for _, run in groupby(pairs, key=lambda pair: pair[0].sequence.adapter_key):
        members = list(run)
        rows = sum(count for _, count in members)
        if (adapter := members[0][0].sequence.adapter) is not None:
            yield adapter, row, row + rows
        row += rows
