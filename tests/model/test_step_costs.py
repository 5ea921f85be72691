"""Measured step costs of a base; figures depend on the machine, so only their shape is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex.engine.merge_cost_model import StepRows
from adaplex.model.measure_costs import ROWS
from rig import ModelRig, prompt
from tiny import save_tiny


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("native", [True, False])
def test_every_product_of_a_step_is_measured(
    tmp_path: Path, quantization: str, native: bool
) -> None:
    rig = ModelRig(save_tiny("llama", tmp_path / "model"), quantization, native=native)
    sequence = rig.sequence(prompt(20))
    before = rig.prefill(sequence)
    costs = rig.runner.step_costs()
    assert costs.rows == ROWS
    for seconds in (costs.base, costs.merged):
        assert all(0 < value < 10 for value in seconds)
    assert all(0 <= value < 10 for value in costs.low_rank)
    assert costs.another_adapter >= 0
    assert costs.step_seconds(StepRows(base=1)) > 0
    assert torch.equal(before, rig.prefill(rig.sequence(prompt(20)))), "it changed the base"


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_any_architecture_can_be_measured(tmp_path: Path, architecture: str) -> None:
    rig = ModelRig(save_tiny(architecture, tmp_path / "model"), "fp32")
    assert rig.runner.step_costs().step_seconds(StepRows(merged={"a": 1})) > 0
