"""NativeForward: steps by the C kernels, all layers in one call, of bases with a DecoderShape.

It gives the logits of TorchForward within rounding; `choose_forward` tries whether it does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import StepCosts
from adaplex.engine.request import Request, SamplingParams
from adaplex.engine.sequence import VIRTUAL, Sequence
from adaplex.model import measure_native_costs
from adaplex.model.adapters.prefix import WriteKV, panel_writer
from adaplex.model.adapters.resident import ResidentAdapters
from adaplex.model.base.loader import BaseModel
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.forward.decoder_shape import DecoderShape, OtherShape
from adaplex.model.forward.decoder_structs import model_struct
from adaplex.model.forward.protocol import Forward, RowRun, runs_of
from adaplex.model.forward.read_decoder import read_decoder
from adaplex.model.kernels.native import structs
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kv_cache import KVCache
from adaplex.model.linear.native import NativeLinear
from adaplex.model.measure_native_costs import Table, TimedLayer
from adaplex.model.progress import Progress
from adaplex.model.weights.int8_head import Int8Head

Array = NDArray[Any]
TOLERANCE = 0.3
"""Largest difference of the logits of both forwards that counts as rounding, as a share of their
norm: rounding nf4 and bf16 makes up to 0.17 in small trained models, a part that is missing or
scaled makes more."""


class NativeForward:
    """Owns the structs that the kernels read, and the tensors that they point to. See Forward."""

    reads_panels = True

    def __init__(
        self,
        shape: DecoderShape,
        kernels: NativeKernels,
        cache: KVCache,
        adapters: ResidentAdapters,
        modules: Mapping[str, BaseModule],
        int8_head: Int8Head | None = None,
    ) -> None:
        """`modules` are all modules of the base, whose order numbers them; `int8_head` is a copy of
        its output layer.
        """
        numbers = {name: number for number, name in enumerate(modules)}
        self._shape, self._kernels, self._cache = shape, kernels, cache
        self._adapters, self._int8_head = adapters, int8_head
        self._model = model_struct(shape, cache, modules, int8_head)
        self._logits = torch.empty(0, shape.head.backend.out_features)
        self.layers = tuple(
            TimedLayer(
                tuple(linear.backend for linear in layer.linears),
                tuple(numbers[linear.name] for linear in layer.linears),
            )
            for layer in shape.layers
        )
        self.modules = len(modules)
        """Modules of the base."""

    @property
    def write_kv(self) -> WriteKV:
        """See Forward."""
        return panel_writer(self._cache, self._kernels.per_unit)

    def __call__(self, batch: Batch, *, needs_logits: bool = True) -> tuple[Tensor, list[int]]:
        """See Forward. The argmaxes are the same with and without `needs_logits`."""
        chunks, sampling = batch.chunks, batch.sampling
        tokens = [t for c in chunks for t in self._tokens(c)]
        ends = list(accumulate(c.count for c in chunks))
        width = -(-max(c.end for c in chunks) // self._cache.block_tokens)
        none = [0] * width
        wanted = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.samples]
        logits = self._logits_buffer(len(wanted))
        likeliest = np.empty(len(wanted), dtype=np.int32)
        arrays = {
            "tokens": np.array(tokens, np.int32),
            "position": np.array([i for c in chunks for i in range(c.start, c.end)], np.int32),
            "first": np.array([0, *ends], np.int32),
            "table": np.array([(c.sequence.blocks + none)[:width] for c in chunks], np.int32),
            "wanted": np.array(wanted, np.int32),
            "likeliest": likeliest,
        }
        run = self._runs(runs_of(chunks, [c.count for c in chunks]))
        every = len(wanted) == len(tokens)
        head_run = run if every else self._runs(runs_of(sampling, [1] * len(sampling)))
        step = structs.Step(
            **{name: array.ctypes.data for name, array in arrays.items()},
            run=run.ctypes.data,
            head_run=head_run.ctypes.data,
            logits=logits.data_ptr(),
            rows=len(tokens),
            sequences=len(chunks),
            width=width,
            wanted_rows=len(wanted),
            runs=len(run),
            head_runs=len(head_run),
            only_likeliest=not needs_logits,
        )
        self._kernels.forward(self._model, step)
        return logits, likeliest.tolist()

    @property
    def int8_head_bytes(self) -> int:
        """See Forward."""
        return 0 if self._int8_head is None else self._int8_head.nbytes

    def warm_up(self, batch: Batch, progress: Progress) -> None:
        """See Forward. Everything is compiled when the library is built."""

    def step_costs(self) -> StepCosts:
        """See Forward."""
        return measure_native_costs.measure(self, self._kernels)

    def seconds(self, rows: int, tables: Seq[Table | None], layers: int) -> float:
        """See TimedDecoder; each token is in the scratch block."""
        each = rows // len(tables)
        addresses = [None if table is None else table.ctypes.data for table in tables]
        run = (structs.Run * len(tables))(
            *(structs.Run(i * each, (i + 1) * each, at) for i, at in enumerate(addresses))
        )
        zeros, first = np.zeros(rows, dtype=np.int32), np.arange(rows + 1, dtype=np.int32)
        step = structs.Step(
            **dict.fromkeys(("tokens", "position", "table"), zeros.ctypes.data),
            first=first.ctypes.data,
            run=structs.address_of(run),
            rows=rows,
            sequences=rows,
            width=1,
            runs=len(run),
        )
        part = structs.Model.from_buffer_copy(self._model)
        part.layers = layers
        begun = time.perf_counter()
        self._kernels.forward(part, step)
        return time.perf_counter() - begun

    def _tokens(self, chunk: Chunk) -> list[int]:
        """Returns the token ids of a chunk; -1 - i stands for virtual token i of its adapter."""
        tokens, adapter = chunk.sequence.tokens[chunk.start : chunk.end], chunk.sequence.adapter
        if adapter is None or chunk.start >= adapter.traits.leading:
            return tokens
        last = VIRTUAL + self._adapters.weights(adapter).prefix_tokens - 1
        return [token if token < VIRTUAL else last - token for token in tokens]

    def _runs(self, runs: Seq[RowRun]) -> Array:
        """Returns int64 [runs, 3]: each row is a structs.Run."""
        address = self._adapters.table_address
        lines = [(run.start, run.stop, address(run.adapter) if run.adapter else 0) for run in runs]
        return np.array(lines, np.int64)

    def _logits_buffer(self, rows: int) -> Tensor:
        """Returns [rows, vocabulary] of the memory that every step uses."""
        if rows > self._logits.shape[0]:
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._logits[:rows]


@torch.inference_mode()
def choose_forward(
    base: BaseModel,
    cache: KVCache,
    adapters: ResidentAdapters,
    modules: Forward,
    progress: Progress,
    *,
    int8_head: bool = False,
) -> Forward:
    """Returns the C decoder if it knows the base's shape and agrees with `modules`, the forward by
    modules of transformers, on a prompt that both run in the scratch block; else `modules`, and a
    line reports why. With `int8_head` the C decoder gets an 8-bit copy of the output layer.
    """
    if base.kernels is None:
        return modules
    if cache.block_tokens != PANEL_COLUMNS:
        progress(
            f"layers run one by one: the C decoder needs KV blocks of {PANEL_COLUMNS} tokens, "
            f"not {cache.block_tokens}"
        )
        return modules
    trial = _trial(base.vocab_size)
    expected = modules(trial)[0]
    positions = min(base.max_positions, cache.num_blocks * cache.block_tokens)
    try:
        shape = read_decoder(base.module, base.shapes, base.step.attention, positions=positions)
    except OtherShape as other:
        progress(f"layers run one by one: the C decoder does not know the base's shape: {other}")
        return modules
    copy = _copy_head(shape.head.backend, progress) if int8_head else None
    native = NativeForward(shape, base.kernels, cache, adapters, base.spec.modules, copy)
    found = native(trial)[0]
    for each in (*cache.keys, *cache.values):
        each[:, 0].zero_()
    difference = torch.linalg.vector_norm(found - expected)
    if difference < TOLERANCE * torch.linalg.vector_norm(expected):
        return native
    progress("layers run one by one: the C decoder gives other logits than the base's modules")
    return modules


def _copy_head(head: NativeLinear, progress: Progress) -> Int8Head | None:
    """Returns the 8-bit copy of an output layer, None where none can be made, which a line
    reports.
    """
    copy = None if head.bias is not None else Int8Head.of(head.panels, head.out_features)
    if copy is None:
        progress("the output layer has no 8-bit copy: it has a bias, or numbers out of range")
    return copy


def _trial(vocab_size: int) -> Batch:
    """Returns a prompt of one block. Its tokens are words: the first tokens of a vocabulary have no
    meaning, so logits after them are mostly rounding.
    """
    tokens = tuple((vocab_size // 2 + i) % vocab_size for i in range(PANEL_COLUMNS))
    sequence = Sequence(Request("trial", tokens, SamplingParams()))
    sequence.blocks = [0]
    return Batch((Chunk(sequence, 0, PANEL_COLUMNS),))
