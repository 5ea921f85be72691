"""ModelRunner: the engine's Runner on torch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SampledToken, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model import measure_costs, measure_native_costs
from adaplex.model.adapters.arena import Arena
from adaplex.model.adapters.fold import FoldedWeights, merge, merged_bytes, merged_parts
from adaplex.model.adapters.packing import HostCache, Packer
from adaplex.model.adapters.prefix import Prefixes, Write, panel_writer
from adaplex.model.base.loader import BaseModel, silent
from adaplex.model.forward.decode_steps import DecodeSteps
from adaplex.model.forward.native_forward import NativeForward, fastest
from adaplex.model.forward.sampler import sample
from adaplex.model.forward.torch_forward import TorchForward
from adaplex.model.kv_cache import KVCache
from adaplex.model.modules.hooks import AdaptedLinear
from adaplex.model.weights.adapter_weights import AdapterWeights, LowRankKernel, low_rank_kernel


class ModelRunner:
    """Runs batches on a loaded base with the adapters in its arena."""

    def __init__(
        self,
        base: BaseModel,
        *,
        num_blocks: int,
        block_tokens: int,
        arena_bytes: int,
        low_rank: LowRankKernel | None = None,
        decode: DecodeSteps | None = None,
        progress: Callable[[str], None] = silent,
    ) -> None:
        """`low_rank` is by default the fastest here; `decode` takes the steps it serves; `progress`
        is told why a step is not one call into C.
        """
        self._base = base
        self._block_tokens, self._progress = block_tokens, progress
        self._modules = {name: index for index, name in enumerate(base.spec.modules)}
        self._arena = Arena(arena_bytes, dtype=base.dtype, device=base.device)
        self._host = HostCache()
        self._merged: dict[str, FoldedWeights] = {}
        self._merged_tables: dict[str, NDArray[np.int64]] = {}
        cache = KVCache(
            base.shapes,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            dtype=base.dtype,
            device=base.device,
        )
        self._low_rank = low_rank or low_rank_kernel(base.kernels, base.device, base.spec.modules)
        modules = TorchForward(
            base,
            cache,
            low_rank=self._low_rank,
            decode=decode,
            weights=self._arena.weights,
            merged=self._merged,
        )
        self._forward = fastest(
            *(base, cache, modules, self._modules, self._table, progress),
            lambda adapter: self._weights(adapter).prefix_tokens,
        )
        write: Write = cache.write
        if isinstance(self._forward, NativeForward) and base.kernels is not None:
            write = panel_writer(cache, base.kernels.per_unit)
        self._prefixes = Prefixes(cache, base.spec.modules, self._weights, write)
        self._packer = Packer(
            base.spec.modules,
            base.dtype,
            pinned=base.device.type == "cuda",
            kernels=base.kernels,
            decoder=isinstance(self._forward, NativeForward),
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> Seq[SampledToken]:
        """One step; see Runner."""
        logits, tops = self._logits(batch)
        return sample(logits, [chunk.sequence for chunk in batch.sampling], tops)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Runs the chunks of a batch; fp32 logits [len(batch.sampling), vocabulary]."""
        return self._logits(batch)[0].clone()

    def _logits(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """As Forward; of a batch that may have nothing to compute."""
        left = self._prefixes.plant(batch)
        return self._forward(left) if left.chunks else (torch.empty(0, 0), [])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs a prompt and one decoding row once, in the scratch block, so that the first request
        pays for no lazy initialisation, and the first adapter of a kind for no compilation.
        """
        sequence = Sequence(Request("warm-up", (0,) * self._block_tokens, SamplingParams()))
        sequence.blocks = [0]
        last = self._block_tokens - 1
        prompt = Batch((Chunk(sequence, 0, self._block_tokens),))
        self.run(prompt)
        self.run(Batch((Chunk(sequence, last, 1),)))
        if isinstance(self._forward, TorchForward):
            self._forward.warm_up(prompt, self._progress)

    @torch.inference_mode()
    def step_costs(self) -> StepCosts:
        """See Runner."""
        base = self._base
        if isinstance(self._forward, NativeForward) and base.kernels is not None:
            return measure_native_costs.measure(self._forward, base.kernels)
        linears = {
            module.name: module.backend
            for module in base.module.modules()
            if isinstance(module, AdaptedLinear) and not module.is_head
        }
        return measure_costs.measure(
            linears,
            self._low_rank,
            dtype=base.dtype,
            device=base.device,
            kernels=base.kernels,
        )

    def pack_adapter(self, program: AdapterProgram) -> None:
        """See Runner."""
        self._host.keep(self._packer.pack(program))

    def remove_host(self, digest: str) -> None:
        """See Runner."""
        self._host.remove(digest)

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        """See Runner."""
        packed = self._host.get(digest)
        assert packed is not None
        self._arena.load(packed, offset, nbytes)

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        """See Runner."""
        self._arena.load(self._packer.pack(program), offset, nbytes)

    def remove_adapter(self, digest: str) -> None:
        """See Runner."""
        self._arena.remove(digest)

    @torch.inference_mode()
    def build_merged(self, program: AdapterProgram) -> int:
        """See Runner."""
        base = self._base
        self._merged[program.digest] = merge(
            program, base.backends, packer=self._packer, device=base.device
        )
        return merged_bytes(program, base.backends, base.dtype)

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        """See Runner."""
        base, modules = self._base, self._base.spec.modules
        inner = {name: b for name, b in base.backends.items() if not modules[name].is_head}
        nbytes = merged_bytes(program, base.backends, base.dtype)
        return FoldedShare(nbytes, *merged_parts(program, inner))

    def remove_merged(self, digest: str) -> None:
        """See Runner."""
        del self._merged[digest]
        self._merged_tables.pop(digest, None)

    def _weights(self, adapter: AdapterRef) -> AdapterWeights:
        """What an adapter in memory does beside dense weights."""
        if adapter.mode is AdapterMode.MERGED:
            return self._merged[adapter.digest].rest
        return self._arena.weights(adapter.digest)

    def _table(self, adapter: AdapterRef) -> int:
        """Where it says what an adapter in memory does, as kernels read it."""
        if adapter.mode is AdapterMode.MERGED:
            return self._merged_table(adapter.digest).ctypes.data
        return self._arena.weights(adapter.digest).address

    def _merged_table(self, digest: str) -> NDArray[np.int64]:
        """Made when a step first asks: only where every linear has panels can there be one."""
        if digest not in self._merged_tables:
            self._merged_tables[digest] = self._merged[digest].table(self._modules)
        return self._merged_tables[digest]
