"""NativeForward: steps of a llama-shaped model by the C kernels, all layers in one call.

Meant to give what `ModuleForward` gives within rounding; whether it does is tried before it serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterRef, Request, SamplingParams
from adaplex.engine.sequence import VIRTUAL, Sequence
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.llama import LINEARS, Llama, LlamaLayer, NotLlama, llama_of
from adaplex.model.forward.protocol import Forward, Tables, runs_of
from adaplex.model.kernels.native import structs
from adaplex.model.kernels.native.kernels import LANES, NativeKernels
from adaplex.model.kv_cache import KVCache
from adaplex.model.linear.native import NativeLinear

Array = NDArray[Any]
TOLERANCE = 0.3
"""How far apart the logits of the two paths may be, as a share of their norm; rounding nf4 and bf16
takes up to 0.17 of small trained models, a part that is missing or scaled takes more."""
PrefixTokens = Callable[[AdapterRef], int]
"""How many of the positions that an adapter puts before the prompt have keys and values given."""


@dataclass(frozen=True)
class NativeLayer:
    """The linears of one layer, and the numbers of their modules."""

    linears: tuple[NativeLinear, ...]
    modules: tuple[int, ...]


class NativeForward:
    """Holds the structs that the kernels read, and what they point to."""

    def __init__(
        self,
        llama: Llama,
        kernels: NativeKernels,
        cache: KVCache,
        modules: Mapping[str, int],
        tables: Tables,
        prefixes: PrefixTokens,
    ) -> None:
        """`modules` numbers every module of the base, `tables` finds what adapters do to them."""
        self._llama, self._kernels, self._cache = llama, kernels, cache
        self._tables, self._prefixes = tables, prefixes
        self._layers = (structs.Layer * len(llama.layers))(
            *(_layer(each, cache, i, modules) for i, each in enumerate(llama.layers))
        )
        self._model = structs.Model(
            embedding=llama.embedding.data_ptr(),
            final_norm=llama.final_norm.data_ptr(),
            cosines=llama.cosines.data_ptr(),
            sines=llama.sines.data_ptr(),
            layer=self._layers,
            head=llama.head.struct,
            layers=len(llama.layers),
            hidden=llama.embedding.shape[1],
            heads=llama.heads,
            kv_heads=llama.kv_heads,
            head_dim=llama.head_dim,
            middle=llama.layers[0].linears[4].out_features,
            vocabulary=llama.head.out_features,
            positions=llama.cosines.shape[0],
            blocks=cache.keys[0].shape[1],
            modules=len(modules),
            embedding_module=modules[llama.embedding_name],
            final_norm_module=modules[llama.final_norm_name],
            head_module=modules[llama.head_name],
            epsilon=llama.epsilon,
            scale=llama.scale,
        )
        self._logits = torch.empty(0, llama.head.out_features)
        self.layers = tuple(
            NativeLayer(each.linears, tuple(modules[name] for name in each.names[: len(LINEARS)]))
            for each in llama.layers
        )
        self.modules = len(modules)
        """How many the base has."""

    def __call__(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """See Forward; the logits are valid until the next step."""
        chunks, sampling = batch.chunks, batch.sampling
        tokens = [t for c in chunks for t in self._tokens(c)]
        ends = list(accumulate(c.count for c in chunks))
        width = -(-max(c.end for c in chunks) // self._cache.block_tokens)
        none = [0] * width
        wanted = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.samples]
        logits = self._room(len(wanted))
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
        )
        self._kernels.forward(self._model, step)
        return logits, likeliest.tolist()

    def seconds(self, rows: int, tables: Seq[Array | None], layers: int) -> float:
        """What the first `layers` take for so many tokens, each in the scratch block; an equal
        part of the rows has each of `tables`, None for the base.
        """
        each = rows // len(tables)
        addresses = [None if table is None else table.ctypes.data for table in tables]
        run = (structs.Run * len(tables))(
            *(structs.Run(i * each, (i + 1) * each, at) for i, at in enumerate(addresses))
        )
        zeros, first = np.zeros(rows, dtype=np.int32), np.arange(rows + 1, dtype=np.int32)
        step = structs.Step(
            **dict.fromkeys(("tokens", "position", "table"), zeros.ctypes.data),
            first=first.ctypes.data,
            run=_address(run),
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
        """Token ids of a chunk; -1 - i stands for virtual token i of its adapter."""
        tokens, adapter = chunk.sequence.tokens[chunk.start : chunk.end], chunk.sequence.adapter
        if adapter is None or chunk.start >= adapter.traits.leading:
            return tokens
        behind = VIRTUAL + self._prefixes(adapter) - 1
        return [token if token < VIRTUAL else behind - token for token in tokens]

    def _runs(self, runs: Seq[tuple[AdapterRef | None, int, int]]) -> Array:
        """[runs, 3] int64: the runs as structs."""
        lines = [(start, stop, self._tables(a) if a else 0) for a, start, stop in runs]
        return np.array(lines, np.int64)

    def _room(self, rows: int) -> Tensor:
        """[rows, vocabulary], the same memory for every step."""
        if rows > self._logits.shape[0]:
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._logits[:rows]


@torch.inference_mode()
def fastest(
    base: BaseModel,
    cache: KVCache,
    modules: Forward,
    numbers: Mapping[str, int],
    tables: Tables,
    progress: Callable[[str], None],
    prefixes: PrefixTokens,
) -> Forward:
    """The C decoder where the base has its shape and it agrees with `modules` on a prompt that is
    run through both, in the scratch block; else `modules`, and a line says why. `numbers` counts
    the modules of the base.
    """
    if base.kernels is None or cache.block_tokens != LANES:
        return modules
    # Words: the first tokens of a vocabulary say nothing, and answers to them hang on rounding.
    tokens = tuple((base.vocab_size // 2 + i) % base.vocab_size for i in range(LANES))
    sequence = Sequence(Request("trial", tokens, SamplingParams()))
    sequence.blocks = [0]
    trial = Batch((Chunk(sequence, 0, LANES),))
    expected = modules(trial)[0]
    positions = min(base.max_positions, cache.keys[0].shape[1] * LANES)
    try:
        llama = llama_of(base.module, positions=positions, windows=base.step.windows)
    except NotLlama as other:
        progress(f"layers run one by one, since the base is not llama-shaped: {other}")
        return modules
    native = NativeForward(llama, base.kernels, cache, numbers, tables, prefixes)
    found = native(trial)[0]
    for each in (*cache.keys, *cache.values):
        each[:, 0].zero_()
    apart = torch.linalg.vector_norm(found - expected)
    if apart < TOLERANCE * torch.linalg.vector_norm(expected):
        return native
    progress("layers run one by one, since the base only looks llama-shaped: its answers differ")
    return modules


def _address(array: Any) -> int | None:
    return structs.address_of(array) if len(array) else None


def _layer(
    layer: LlamaLayer, cache: KVCache, index: int, modules: Mapping[str, int]
) -> structs.Layer:
    def optional(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    names = ("q", "k", "v", "o", "gate", "up", "down")
    return structs.Layer(
        **{name: linear.struct for name, linear in zip(names, layer.linears, strict=True)},
        attention_norm=layer.attention_norm.data_ptr(),
        mlp_norm=layer.mlp_norm.data_ptr(),
        q_norm=optional(layer.q_norm),
        k_norm=optional(layer.k_norm),
        keys=cache.keys[index].data_ptr(),
        values=cache.values[index].data_ptr(),
        window=layer.window,
        modules=(structs.Integer * 13)(*(modules.get(name, 0) for name in layer.names)),
    )
