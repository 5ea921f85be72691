"""Steps with activations of 8 bits, in one C call, against the modules over mixes of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.forward import native_forward
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.torch_forward import TorchForward
from adaplex.model.kernels.native import instruction_sets
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import NativeKernels
from instruction_sets import each_instruction_set
from model.spread_adapters import spread_adapters
from peft_families import FAMILIES
from rig import ModelRig, lowered, prompt
from two_forwards import decode, forward_of

BOUNDS = {("nf4", "bf16"): 3e-2, ("int4-group", "fp32"): 3e-3}
"""Quantization and compute dtype -> largest distance of a step from the modules: an activation that
another order of sums moves across the middle of two integers is rounded to the other."""


def rig_of(model: Path, quantization: str, dtype: str, activations: str = "int8") -> ModelRig:
    return ModelRig(model, quantization, dtype, cpu_activations=activations)


def programs_for(model: Path, rig: ModelRig, folder: Path) -> list[AdapterProgram]:
    """Returns LoRAs of mixed ranks and targets, and an IA3, which scales the inputs of a linear."""
    loras = [each.program for each in spread_adapters(model, rig.base.spec, "llama").values()]
    ia3 = FAMILIES["ia3"].save(model, folder / "ia3", 2)
    return [*loras, lowered(ia3, rig.base.spec)]


def add_all(rig: ModelRig, programs: list[AdapterProgram]) -> list[AdapterRef]:
    """Makes all adapters resident, the second one merged."""
    merged, unmerged = AdapterMode.MERGED, AdapterMode.UNMERGED
    return [rig.add(each, merged if i == 1 else unmerged) for i, each in enumerate(programs)]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the norm of the difference of all logits, as a share of their norm."""
    one, other = torch.cat(got), torch.cat(expected)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("quantization", "dtype"), list(BOUNDS))
@each_instruction_set
def test_a_step_in_one_call_equals_the_modules_over_mixes(
    quantization: str,
    dtype: str,
    instructions: InstructionSet,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    model = tiny_model("llama")
    fast = rig_of(model, quantization, dtype)
    exact = rig_of(model, quantization, dtype, "float")
    monkeypatch.setattr(native_forward, "TOLERANCE", 0.0)  # so that modules run the layers
    slow = rig_of(model, quantization, dtype)
    assert [forward_of(rig) for rig in (fast, exact, slow)] == [
        NativeForward,
        NativeForward,
        TorchForward,
    ]
    programs = programs_for(model, slow, tmp_path)
    refs = [add_all(rig, programs) for rig in (fast, slow, exact)]
    count = len(programs)
    mixes = {
        "distinct": [None, *range(count), None],
        "identical": [None, *[0] * 8],
        "uniform": [i % count for i in range(9)],
        "skewed": [2, 2, 2, None, 2, count - 1, 2, 2, 0],
        "zipf": [0, 0, 0, 0, 1, 1, 2, None],
    }
    for mix in mixes.values():
        used = [[None if i is None else each[i] for i in mix] for each in refs]
        expected = decode(slow, used[1], None)
        got = decode(fast, used[0], expected)
        assert distance(got, expected) < BOUNDS[quantization, dtype]
        in_float = decode(exact, used[2], expected)
        assert 2e-3 < distance(got, in_float) < 0.1


@pytest.mark.parametrize(("quantization", "dtype"), list(BOUNDS))
@each_instruction_set
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_threads(
    quantization: str,
    dtype: str,
    instructions: InstructionSet,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    use_threads: Callable[[NativeKernels, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    model = tiny_model("llama")
    rig = rig_of(model, quantization, dtype)
    assert rig.base.kernels is not None
    refs = [None, *add_all(rig, programs_for(model, rig, tmp_path))]
    whole = rig.prefill(*(rig.sequence(prompt(5 + 7 * i), ref) for i, ref in enumerate(refs)))
    for threads in (1, 2, 3):
        use_threads(rig.base.kernels, threads)
        for i, ref in enumerate(refs):
            alone = rig.prefill(rig.sequence(prompt(5 + 7 * i), ref))
            assert torch.equal(alone[0], whole[i])
