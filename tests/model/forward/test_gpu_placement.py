"""Steps on a GPU mix no devices and do not wait for it: checked with tensors without memory.

A runner has a base on torch's meta device, and the kernels of CUDA devices, which are not run. Its
tensors mix with the host's no more than a GPU's would, and nothing can be read from them: what
would wait for a GPU raises.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from adaplex.adapters.program.primitives import KVPrefix
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode
from adaplex.engine.sequence import Sequence
from adaplex.model import select
from adaplex.model.adapters.triton_rows import TritonKernels
from adaplex.model.base.loader import BaseModel
from adaplex.model.forward import torch_forward
from adaplex.model.forward.decode_steps import Replay
from adaplex.model.kernels.triton import attention as triton_attention
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.modules import attention
from adaplex.model.modules.hooks import AdaptedLinear
from adaplex.model.runner import ModelRunner
from adaplex.model.weights.int4_group import Int4Weight
from random_programs import anything, made
from rig import BLOCK, ModelRig, prompt

pytestmark = pytest.mark.slow

THERE = torch.device("meta")
FIRST = 4096
"""Bytes before the first adapter: address 0 stands for no tensor."""
MAKES = (torch.tensor, torch.as_tensor, torch.asarray)
MOVES = (Tensor.to, Tensor.copy_)


class OneDevice(TorchFunctionMode):
    """Refuses tensors of both devices in one operation, but for single numbers of the host.
    Between operations tensors may be moved, unless the step is `captured`.
    """

    def __init__(self, *, captured: bool) -> None:
        super().__init__()
        self._captured = captured

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        moves = function in MOVES
        places = {t.device for t in tensors if moves or t.dim()}
        if self._captured:
            assert places <= {THERE}, f"{resolve_name(function)} on {places}"
            assert function not in MAKES or result.device != THERE, (
                f"{resolve_name(function)} from the host"
            )
        elif not moves:
            assert len(places) <= 1, f"{resolve_name(function)} on {places}"
        return result


class Kernels:
    """In place of Triton: records launches, whose tensors must all be on the device."""

    def __init__(self) -> None:
        self.launched: set[str] = set()

    def run(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        for tensor in tree_leaves((args, kwargs)):
            assert not isinstance(tensor, Tensor) or tensor.device == THERE, kernel.__name__
        self.launched.add(kernel.__name__)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Kernels are not run, and likeliest tokens, for which each step would wait, not computed."""
    kernels = Kernels()
    kind = type(triton_attention._decode)
    monkeypatch.setattr(kind, "run", lambda kernel, *a, **kw: kernels.run(kernel, *a, **kw))
    monkeypatch.setattr(torch_forward, "likeliest", lambda logits: [])
    return kernels


def moved(base: BaseModel) -> BaseModel:
    """Returns the base on the meta device, with the kernels of CUDA devices."""
    for module in base.module.modules():
        if isinstance(module, AdaptedLinear):
            module.backend = _moved(module.backend, base.dtype)
    base.module.to(THERE)
    attend = select.paged_attend(torch.device("cuda"))
    attention.install(base.module, attention.PagedAttention(base.step, attend))
    return replace(base, device=THERE)


def _moved(kept: LinearBackend, dtype: torch.dtype) -> LinearBackend:
    """Returns an int4-group backend as it is, any other one dense."""
    bias = None if kept.bias is None else kept.bias.to(THERE)
    if not isinstance(kept, Int4GroupLinear):
        return DenseLinear(kept.dequantize().to(THERE, dtype), bias)
    weight = Int4Weight(**{name: tensor.to(THERE) for name, tensor in kept.tensors().items()})
    return Int4GroupLinear(weight, bias, product=select.products(torch.device("cuda")).int4)


class Captured:
    """Runs steps under the conditions of a CUDA graph, and counts them."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, step: Replay) -> Replay:
        def run() -> Tensor:
            self.runs += 1
            with OneDevice(captured=True):
                return step()

        return run


class Placed:
    """A rig whose base is on the meta device."""

    def __init__(self, model: Path, quantization: str = "fp32") -> None:
        self.rig = ModelRig(model, quantization, native=False)
        self.captured = Captured()
        base = moved(self.rig.base)
        kernels = TritonKernels(base.spec.modules, THERE)
        self.rig.runner = ModelRunner.for_base(
            base,
            num_blocks=64,
            block_tokens=BLOCK,
            arena_bytes=8 << 20,
            kernels=kernels,
            capture=self.captured,
        )
        self.rig._offset = FIRST

    def step(self, *chunks: Chunk) -> None:
        """Runs the chunks; raises if an operation mixes devices."""
        with OneDevice(captured=False):
            logits = self.rig.runner.forward(Batch(chunks))
        assert logits.shape == (sum(chunk.samples for chunk in chunks), self.rig.base.vocab_size)
        assert logits.device == THERE

    def decode(self, rows: Seq[Sequence]) -> None:
        """Decodes one more token of each."""
        self.step(*(Chunk(row, len(row) - 1, 1) for row in rows))


def before_the_prompt(rig: ModelRig) -> AdapterProgram:
    """Returns an adapter of two virtual tokens behind a prefix of three."""
    modules = []
    for name, module in sorted(rig.base.spec.modules.items()):
        if module.part == "attention":
            heads, key, value = rig.base.spec.kv_shapes[module.layer]
            prefix = KVPrefix(torch.ones(3, heads, key), torch.ones(3, heads, value))
            modules.append(ModuleProgram(name, prefix=prefix))
        elif module.kind == "embedding":
            modules.append(ModuleProgram(name, virtual=torch.ones(2, module.out_features)))
    return AdapterProgram("sha256:before", "prefix", tuple(modules))


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def placed(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], kernels: Kernels
) -> Placed:
    return Placed(tiny_model(request.param))


def test_a_step_that_is_captured_needs_nothing_of_the_host(
    placed: Placed, kernels: Kernels
) -> None:
    rig = placed.rig
    adapters = [rig.add(anything(rig, 0)), rig.add(anything(rig, 1)), rig.add(made(rig, 3, 2))]
    for chosen in ([None], [None, adapters[2]], [None, *adapters, adapters[1]]):
        placed.decode([rig.sequence(prompt(5), adapter) for adapter in chosen])
    assert placed.captured.runs == 3
    assert {"_decode", "_combine", "_shrink", "_expand", "_embed"} < kernels.launched


def test_prompts_and_merged_rows_mix_no_devices(placed: Placed, kernels: Kernels) -> None:
    """Also where positions before the prompt are written and computed."""
    rig = placed.rig
    merged = rig.add(anything(rig, 0), AdapterMode.MERGED)
    adapters = [None, rig.add(anything(rig, 1)), rig.add(before_the_prompt(rig)), merged]
    rows = [rig.sequence(prompt(9), adapter) for adapter in adapters]
    placed.step(*(Chunk(row, 0, len(row)) for row in rows))
    placed.step(Chunk(rows[3], 0, 9))
    placed.decode(rows)
    assert placed.captured.runs == 0
    assert {"_prompt", "_decode", "_combine", "_embed"} < kernels.launched


def test_costs_are_measured_where_the_base_is(placed: Placed, kernels: Kernels) -> None:
    with OneDevice(captured=False):
        placed.rig.runner.step_costs()
    assert kernels.launched == {"_shrink", "_expand"}


def test_int4_codes_are_multiplied_where_they_are(
    tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    """No step dequantizes the weight, and a captured one needs nothing of the host."""
    placed = Placed(tiny_model("llama"), "int4-group")
    rig = placed.rig
    rows = [rig.sequence(prompt(9), adapter) for adapter in (None, rig.add(made(rig, 3, 2)))]
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(Int4Weight, "dequantized")
        placed.step(*(Chunk(row, 0, len(row)) for row in rows))
        placed.decode(rows)
    assert placed.captured.runs == 1
    assert {"_multiply", "_shrink", "_expand"} < kernels.launched
