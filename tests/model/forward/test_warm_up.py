"""After the warm-up of a GPU's kernels none is compiled, by the keys that Triton compiles for.

A launch is asked for the key under which Triton looks a compiled kernel up: types, constants, and
which numbers and addresses are multiples of 16, or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.adapters.triton_rows import TritonKernels
from adaplex.model.kernels.triton import attention as triton_attention
from adaplex.model.kernels.triton import low_rank as triton_low_rank
from adaplex.model.kernels.triton import product as triton_product
from adaplex.model.kernels.triton import weight_formats
from adaplex.model.kernels.triton.dot import LEAST
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.step.launch_plan import Launch, LaunchPlan
from adaplex.model.step.tiles import Tile
from random_programs import anything, made
from rig import ModelRig, prompt

pytestmark = pytest.mark.slow

TARGET = make_backend(GPUTarget("cuda", 90, 32))
KERNEL = type(triton_attention._decode)
ANYTHING = {"_shrink", "_expand", "_scale", "_product", "_rows", "_embed"}
"""Kernels that only adapters launch."""


class Recorder:
    """Records launches by key; no kernel runs."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._binders: dict[str, Any] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = self._binders.get(kernel.__name__)
        if binder is None:
            binder = self._binders[kernel.__name__] = _binder(kernel)
        _, key, _ = binder(*args, **kwargs, debug=False)
        self.seen.add((kernel.__name__, repr(key)))

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.seen}


def _binder(kernel: Any) -> Any:
    """Returns Triton's own binder: arguments -> (.., key that a kernel is compiled for, ..)."""
    said = ("do_not_specialize", "do_not_specialize_on_alignment")
    options = {name: getattr(kernel, "kwargs", vars(kernel))[name] for name in said}
    compiled = JITFunction(kernel.fn, **options)
    return create_function_from_signature(compiled.signature, compiled.params, TARGET)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Blocks are so small that tiny widths have several splits."""
    recorder = Recorder()
    for name in ("SPLIT", "BLOCK_IN"):
        monkeypatch.setattr(triton_low_rank, name, 32)
    for name, least in (("DENSE", 32), ("NF4", 64), ("INT4", 32)):
        form = getattr(weight_formats, name)
        monkeypatch.setattr(weight_formats, name, replace(form, block_in=least))
    monkeypatch.setattr(KERNEL, "run", lambda kernel, *a, **kw: recorder.launch(kernel, *a, **kw))
    return recorder


def virtual(rig: ModelRig) -> AdapterProgram:
    """Returns an adapter of virtual tokens."""
    name, module = next(m for m in rig.base.spec.modules.items() if m[1].kind == "embedding")
    tokens = torch.ones(3, module.out_features)
    return AdapterProgram("sha256:v", "x", (ModuleProgram(name, virtual=tokens),))


def serve(rig: ModelRig) -> None:
    """Runs prompts and decoding rows of one and of many adapters, in steps of all kinds."""
    programs = [*(anything(rig, seed) for seed in range(4)), made(rig, 3, 9), virtual(rig)]
    adapters = [None, *map(rig.add, programs), rig.add(anything(rig, 5), AdapterMode.MERGED)]
    rows = [rig.sequence(prompt(2 + 5 * i, seed=i), a) for i, a in enumerate(adapters)]
    for row in rows:
        rig.prefill(row)
    rig.prefill(*rows)
    for row in rows:
        row.tokens.append(9)
        rig.decode(row)
    rig.decode(*rows)
    rig.decode(*rows[:5])
    ones = [Chunk(row, len(row) - 1, 1) for row in rows[:3]]
    rig.forward(*ones, *(Chunk(row, 0, len(row)) for row in rows[3:]))
    rig.forward(ones[0], Chunk(rows[4], 0, len(rows[4])))
    long = rig.sequence(prompt(300), adapters[1])
    rig.prefill(long)
    rig.forward(Chunk(long, 299, 1), ones[1])


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "fp32"),
        ("llama", "bf16"),
        ("qwen2", "fp32"),
        ("qwen3", "bf16"),
        ("mistral", "fp32"),
        ("gemma2", "bf16"),
        ("gpt2", "fp32"),
        ("mixtral", "bf16"),
    ],
)
def test_later_steps_launch_nothing_else(
    architecture: str, dtype: str, tiny_model: Callable[[str], Path], recorder: Recorder
) -> None:
    rig = ModelRig(tiny_model(architecture), dtype, triton=True)
    rig.runner.warm_up()
    assert recorder.names >= ANYTHING
    warm = set(recorder.seen)
    recorder.seen.clear()
    serve(rig)
    assert recorder.names >= ANYTHING
    assert recorder.seen - warm == set()


@pytest.mark.usefixtures("cuda_products")
@pytest.mark.parametrize("quantization", ["nf4", "int8", "int4-group", "bf16"])
def test_products_are_compiled_for_any_number_of_rows(
    quantization: str, tiny_model: Callable[[str], Path], recorder: Recorder
) -> None:
    """Also products by folded weights, dense or not, with a bias that the base lacks."""
    rig = ModelRig(tiny_model("llama"), quantization, "bf16", triton=True)
    rig.runner.warm_up()
    warm = set(recorder.seen)
    assert "_multiply" in recorder.names
    recorder.seen.clear()
    name, adapters = "model.layers.1.self_attn.q_proj", []
    for i, (bias, group) in enumerate(product((None, torch.ones(64)), (1, 32))):
        pair = LowRank(torch.ones(2, 64), torch.ones(64, 2), group)
        program = AdapterProgram(f"sha256:{i}", "x", (ModuleProgram(name, pair, bias=bias),))
        adapters.append(rig.add(program, AdapterMode.MERGED))
    for length in (1, 16, 17, 64, 65, 130):
        rig.prefill(*(rig.sequence(prompt(length), adapter) for adapter in (None, *adapters)))
    assert recorder.names >= {"_multiply", "_add"}
    assert recorder.seen - warm == set()


def test_a_bias_alone_is_the_same_kernel_as_with_a_pair(recorder: Recorder) -> None:
    """For an odd number of outputs, for which no norm compiles it."""
    there = torch.device("cpu")
    kernels = TritonKernels({"head": BaseModule("head", "linear", 100, 21)}, there)
    tiles = torch.tensor([Tile.none()]).T.contiguous()
    for needed in ({Launch.OUTPUT}, {Launch.NARROW, Launch.OUTPUT}):
        launches = LaunchPlan(tuple(int(launch in needed) for launch in Launch))
        rows = kernels.rows(tiles, launches, max_rank=4)
        rows.linear("head", DenseLinear(torch.zeros(21, 100), None), torch.zeros(3, 100))
    assert sorted(name for name, _ in recorder.seen) == ["_expand", "_shrink"]


def test_every_tile_is_among_those_that_are_tried() -> None:
    def tile(rows: int) -> tuple[bool, bool]:
        return rows <= LEAST, rows <= triton_product.PROMPT_ROWS

    every = {tile(rows) for rows in range(1, 200)}
    assert {tile(rows) for rows in triton_product.EVERY_TILE} == every


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_warm_up_changes_nothing_that_steps_see(
    architecture: str, tiny_model: Callable[[str], Path]
) -> None:
    """Before the first step, and between steps of sequences."""
    logits = []
    for times in (0, 1):
        rig = ModelRig(tiny_model(architecture), triton=True, num_blocks=64, arena_bytes=8 << 20)
        rig.runner._arena._flat.zero_()
        for _ in range(times):
            rig.runner.warm_up()
        adapters = [None, rig.add(anything(rig, 0)), rig.add(anything(rig, 1), AdapterMode.MERGED)]
        rows = [rig.sequence(prompt(5 + i), adapter) for i, adapter in enumerate(adapters)]
        logits.append(rig.prefill(*rows))
        for row in rows:
            row.tokens.append(9)
        kept = _state(rig)
        for _ in range(times):
            rig.runner.warm_up()
        assert all(map(torch.equal, _state(rig), kept))
        logits.append(rig.decode(*rows))
        logits.append(rig.decode(*rows[:2]))
    assert all(map(torch.equal, logits[:3], logits[3:]))
    assert torch.isfinite(torch.cat(logits)).all()


def _state(rig: ModelRig) -> list[torch.Tensor]:
    """Returns copies of what steps read and write, but for the scratch block, and of launches."""
    forward: Any = rig.runner._forward
    cache, table = rig.base.step.cache, forward._kernels._table
    assert cache is not None
    bits = [*forward._decode._launches.values()]
    launches = [torch.tensor([n.bit_count() for n in each.modules]) for each in bits]
    counts = torch.tensor([len(forward._decode._replays), len(table._resident)])
    blocks = [tensor[:, 1:].clone() for tensor in (*cache.keys, *cache.values)]
    return [*blocks, rig.runner._arena._flat.clone(), table._table.clone(), *launches, counts]
