"""ModelRunner: the engine's Runner on torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import Request, SampledToken, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model import select
from adaplex.model.adapters.arena import Arena
from adaplex.model.adapters.fold import fold, folded_bytes, folded_shares
from adaplex.model.adapters.packing import HostCache, Packer
from adaplex.model.adapters.prefix import PrefixWriter
from adaplex.model.adapters.resident import ResidentAdapters
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.cuda_graphs import capture_for
from adaplex.model.forward.decode_steps import Capture, DecodeSteps
from adaplex.model.forward.native_forward import choose_forward
from adaplex.model.forward.protocol import Forward
from adaplex.model.forward.sampler import sample
from adaplex.model.forward.torch_forward import TorchForward
from adaplex.model.kv_cache import KVCache
from adaplex.model.progress import Progress, silent
from adaplex.model.step.tiles import AdapterKernels


class ModelRunner:
    """Runs batches on a loaded base with the adapters in its arena. Made by `for_base`."""

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        arena: Arena,
        adapters: ResidentAdapters,
        forward: Forward,
        *,
        progress: Progress,
    ) -> None:
        """`progress` is called for each fallback."""
        self._base = base
        self._block_tokens, self._progress = cache.block_tokens, progress
        self._arena, self._adapters, self._forward = arena, adapters, forward
        self._host = HostCache()
        self._prefixes = PrefixWriter(cache, base.spec.modules, adapters, forward.write_kv)
        self._packer = Packer(
            base.spec.modules,
            base.dtype,
            pinned=base.device.type == "cuda",
            kernels=base.kernels,
            whole_model=forward.reads_panels,
        )

    @classmethod
    def for_base(
        cls,
        base: BaseModel,
        *,
        num_blocks: int,
        block_tokens: int,
        arena_bytes: int,
        kernels: AdapterKernels | None = None,
        capture: Capture | None = None,
        enforce_eager: bool = False,
        int8_head: bool = False,
        progress: Progress = silent,
    ) -> ModelRunner:
        """Makes a runner with a KV cache and an arena of these sizes, by the fastest forward of the
        base's device.

        `kernels` and `capture` replace those of the device;
        `enforce_eager` captures no steps; with `int8_head` the C decoder reads an 8-bit copy of the
        output layer where only likeliest tokens count. `progress` is called for each fallback.
        """
        cache = KVCache(
            base.shapes,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            dtype=base.dtype,
            device=base.device,
        )
        arena = Arena(arena_bytes, dtype=base.dtype, device=base.device)
        numbers = {name: index for index, name in enumerate(base.spec.modules)}
        adapters = ResidentAdapters(arena, numbers)
        kernels = kernels or select.adapter_kernels(base.device, base.spec.modules)
        decode = None
        if kernels is not None:
            decode = DecodeSteps(
                base,
                kernels,
                block_tokens=block_tokens,
                min_rows=select.min_rows(base.device),
                capture=capture or capture_for(base, progress, enforce_eager=enforce_eager),
            )
        modules = TorchForward(base, cache, adapters, kernels=kernels, decode=decode)
        forward = choose_forward(base, cache, adapters, modules, progress, int8_head=int8_head)
        if int8_head and not forward.int8_head_bytes:
            progress("head int8 has no effect: only the C decoder reads an 8-bit output layer")
        return cls(base, cache, arena, adapters, forward, progress=progress)

    @property
    def int8_head_bytes(self) -> int:
        """Bytes of the 8-bit copy of the output layer; 0 without one."""
        return self._forward.int8_head_bytes

    @torch.inference_mode()
    def run(self, batch: Batch) -> Seq[SampledToken]:
        """See Runner."""
        logits, tops = self._logits(batch, needs_logits=not batch.plain)
        return sample(logits, [chunk.sequence for chunk in batch.sampling], tops)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Runs the chunks of a batch; returns fp32 logits [len(batch.sampling), vocabulary]."""
        return self._logits(batch)[0].clone()

    def _logits(self, batch: Batch, *, needs_logits: bool = True) -> tuple[Tensor, list[int]]:
        """Returns logits as Forward does, of a batch that may have nothing to compute."""
        rest = self._prefixes.write_prefix_kv(batch)
        if not rest.chunks:
            return torch.empty(0, 0), []
        return self._forward(rest, needs_logits=needs_logits)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs a prompt and one decoding row once, in the scratch block, so that the first request
        waits for no lazy initialisation, and the first adapter of a kind for no compilation.
        """
        sequence = Sequence(Request("warm-up", (0,) * self._block_tokens, SamplingParams()))
        sequence.blocks = [0]
        last = self._block_tokens - 1
        prompt = Batch((Chunk(sequence, 0, self._block_tokens),))
        self.run(prompt)
        self.run(Batch((Chunk(sequence, last, 1),)))
        self._forward.warm_up(prompt, self._progress)

    @torch.inference_mode()
    def step_costs(self) -> StepCosts:
        """See Runner."""
        return self._forward.step_costs()

    def pack_adapter(self, program: AdapterProgram) -> None:
        """See Runner."""
        self._host.store(self._packer.pack(program))

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
        folded = fold(
            program,
            base.backends,
            packer=self._packer,
            dense=base.dense_linear,
            device=base.device,
        )
        self._adapters.add_folded(program.digest, folded)
        return folded_bytes(program, base.backends, base.dtype)

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        """See Runner."""
        base = self._base
        nbytes = folded_bytes(program, base.backends, base.dtype)
        return FoldedShare(nbytes, *folded_shares(program, base.layer_backends))

    def remove_merged(self, digest: str) -> None:
        """See Runner."""
        self._adapters.remove_folded(digest)
