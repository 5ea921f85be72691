"""Norms of single heads, as qwen3 has them, replaced by adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch

from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Chunk
from peft_adapters import Oracle, load_plain
from peft_families import around, family, lora
from rig import ModelRig, lowered, prompt

NORMS = ["q_norm", "k_norm", "input_layernorm"]
LN_TUNING = family(lambda _: peft.LNTuningConfig(target_modules=NORMS), around())
QUERY, KEY = (f"model.layers.1.self_attn.{part}_norm" for part in "qk")


@pytest.fixture(params=["native", "torch", "triton"])
def rig(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> ModelRig:
    path = request.param
    return ModelRig(tiny_model("qwen3"), native=path == "native", triton=path == "triton")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3")


def test_ln_tuning_of_head_norms_is_that_of_peft(
    rig: ModelRig, model: Path, tmp_path: Path
) -> None:
    directory = LN_TUNING.save(model, tmp_path / "norms", 2)
    pairs = lora(target_modules=["q_proj", "k_proj"]).save(model, tmp_path / "pairs", 3)
    program = lowered(directory, rig.base.spec)
    assert {QUERY, KEY} <= {module.module for module in program.modules}
    ref, beside = rig.add(program), rig.add(lowered(pairs, rig.base.spec))
    tokens = prompt(21)
    oracles = [Oracle(load_plain(model), adapter) for adapter in (directory, None, pairs)]
    expected = [oracle.logits(tokens) for oracle in oracles]
    assert (expected[0] - expected[1]).abs().max() > 1e-2, "the adapter does nothing"

    mixed = rig.prefill(*(rig.sequence(tokens, each) for each in (ref, None, beside)))
    for row, wanted in zip(mixed, expected, strict=True):
        assert (row - wanted).abs().max() < 1e-4
    sequence = rig.sequence(tokens, ref)
    for start in range(0, len(tokens), 8):
        rows = rig.forward(Chunk(sequence, start, min(8, len(tokens) - start)))
    assert (rows[0] - expected[0]).abs().max() < 1e-4
    (output,) = rig.generate([rig.sequence(tokens, ref)], 3)
    assert output == oracles[0].greedy(tokens, 3)


def test_a_row_does_not_depend_on_its_mates(model: Path, tmp_path: Path) -> None:
    rig = ModelRig(model, native=False)
    ref = rig.add(lowered(LN_TUNING.save(model, tmp_path / "norms", 2), rig.base.spec))
    alone = rig.prefill(rig.sequence(prompt(13), ref))[0]
    mates = [rig.sequence(prompt(9 + i), ref if i % 2 else None) for i in range(3)]
    assert torch.equal(rig.prefill(mates[0], rig.sequence(prompt(13), ref), *mates[1:])[1], alone)


def test_a_bias_is_added_to_every_head(rig: ModelRig, model: Path) -> None:
    bias = torch.linspace(-1, 1, 16)
    program = AdapterProgram("bias", "bitfit", (ModuleProgram(KEY, bias=bias),))
    plain, moved = rig.prefill(rig.sequence(prompt(5)), rig.sequence(prompt(5), rig.add(program)))
    assert (moved - plain).abs().max() > 1e-3, "the adapter does nothing"

    other = ModelRig(model, native=False)
    norm = other.base.module.get_submodule(KEY)
    handle = norm.register_forward_hook(lambda _module, _x, y: y + bias)
    expected = other.prefill(other.sequence(prompt(5)))[0]
    handle.remove()
    assert (moved - expected).abs().max() < 1e-4
