"""ModelRig: a loaded base and a runner that tests drive by hand, without an engine."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model import select
from adaplex.model.adapters.triton_rows import TritonKernels
from adaplex.model.base.loader import load_base
from adaplex.model.constants import KV_BLOCK_TOKENS
from adaplex.model.modules import attention
from adaplex.model.progress import Progress, silent
from adaplex.model.runner import ModelRunner

BLOCK = KV_BLOCK_TOKENS
ARENA = 64 << 20


class Programs(dict[str, AdapterProgram]):
    """Adapters by digest, as a source for an engine."""

    def program(self, digest: str) -> AdapterProgram:
        return self[digest]


class ModelRig:
    """A base and its runner; blocks and arena extents are never reused."""

    def __init__(
        self,
        model: Path | str,
        quantization: str = "fp32",
        dtype: str = "auto",
        *,
        native: bool = True,
        saved: Path | None = None,
        triton: bool = False,
        graphs: bool = False,
        group_size: int = 32,
        cpu_activations: str = "float",
        num_blocks: int = 2048,
        arena_bytes: int = ARENA,
        int8_head: bool = False,
        progress: Progress = silent,
    ) -> None:
        """`triton` forces the kernels and the replayed decoding of CUDA devices, on one if there is
        one; everything else runs on the CPU. With `graphs` a GPU replays decoding from CUDA graphs.
        """
        self.base = load_base(
            str(model),
            quantization=quantization,
            group_size=group_size,
            dtype=dtype,
            cpu_activations=cpu_activations,
            device="auto" if triton else "cpu",
            native=native and not triton,
            saved=saved,
        )
        self.programs = Programs()
        kernels = None
        if triton:
            attend = select.paged_attend(torch.device("cuda"))
            attention.install(self.base.module, attention.PagedAttention(self.base.step, attend))
            kernels = TritonKernels(self.base.spec.modules, self.base.device)
        self.runner = ModelRunner.for_base(
            self.base,
            num_blocks=num_blocks,
            block_tokens=BLOCK,
            arena_bytes=arena_bytes,
            kernels=kernels,
            enforce_eager=not graphs,
            int8_head=int8_head,
            progress=progress,
        )
        self._blocks = count(1)
        self._offset = 0

    def add(self, program: AdapterProgram, mode: AdapterMode = AdapterMode.UNMERGED) -> AdapterRef:
        """Makes an adapter resident in the mode."""
        self.programs[program.digest] = program
        size = program.packed_bytes(self.base.dtype.itemsize)
        if mode is AdapterMode.MERGED:
            self.runner.build_merged(program)
        else:
            self.runner.load_adapter(program, self._offset, size)
            self._offset += size
        return AdapterRef("a", 1, program.digest, size, program.traits, mode)

    def sequence(
        self,
        tokens: Seq[int],
        adapter: AdapterRef | None = None,
        sampling: SamplingParams | None = None,
        *,
        room: int = 64,
    ) -> Sequence:
        """Returns a sequence with blocks for `room` more tokens."""
        request = Request("r", tuple(tokens), sampling or SamplingParams(), adapter)
        sequence = Sequence(request)
        sequence.blocks = [next(self._blocks) for _ in range((len(tokens) + room) // BLOCK + 1)]
        return sequence

    def forward(self, *chunks: Chunk) -> Tensor:
        """Returns fp32 logits [chunks, vocabulary] of the chunks that sample, on the CPU."""
        return self.runner.forward(Batch(chunks)).cpu()

    def prefill(self, *sequences: Sequence) -> Tensor:
        """Runs whole prompts in one step; returns their logits."""
        return self.forward(*(Chunk(s, 0, len(s)) for s in sequences))

    def decode(self, *sequences: Sequence) -> Tensor:
        """Runs one step of sequences that have one token to compute; returns their logits."""
        return self.forward(*(Chunk(s, len(s) - 1, 1) for s in sequences))

    def generate(self, sequences: Seq[Sequence], steps: int) -> list[list[int]]:
        """Returns the greedy tokens of every sequence, decoded in one batch."""
        logits = self.prefill(*sequences)
        for _ in range(steps):
            for sequence, row in zip(sequences, logits, strict=True):
                sequence.tokens.append(int(row.argmax()))
            logits = self.decode(*sequences)
        return [s.output for s in sequences]


def lowered(directory: Path, base: BaseSpec) -> AdapterProgram:
    """Reads and lowers an adapter directory, as an upload does."""
    limits = AdapterLimits()
    return formats.lower(read_checkpoint(directory, limits), base, limits)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Returns random tokens of the tiny vocabulary, no special ones."""
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(3, 259, (length,), generator=generator).tolist()
