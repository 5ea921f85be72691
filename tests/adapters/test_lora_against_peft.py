"""Lowered adapters against PEFT's own deltas, module by module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from peft_adapters import attention, everything, save_adapter, spread

LIMITS = AdapterLimits()
ARCHITECTURES = ["llama", "gpt2", "qwen2"]
CASES = [*spread("llama"), "excluded", "excluded-regex", "all-linear", "layers-list", "full-names"]


def fields_of(case: str, architecture: str) -> dict[str, Any]:
    every = everything(architecture)
    layer = "h" if architecture == "gpt2" else "layers"
    more: dict[str, dict[str, Any]] = {
        "excluded": {"target_modules": every, "exclude_modules": [every[0], f"1.mlp.{every[-1]}"]},
        "excluded-regex": {"target_modules": every, "exclude_modules": rf".*\.{layer}\.1\..*"},
        "all-linear": {"target_modules": "all-linear"},
        "layers-list": {
            "target_modules": attention(architecture),
            "layers_to_transform": [0, 2],
            "layers_pattern": ["blocks", layer],
        },
        "full-names": {
            "target_modules": [
                f"{'transformer.h' if layer == 'h' else 'model.layers'}.1."
                f"{'attn.c_attn' if layer == 'h' else 'self_attn.q_proj'}",
            ],
        },
    }
    return spread(architecture).get(case) or {"r": 3, "lora_alpha": 5, **more[case]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_deltas_are_pefts(
    case: str,
    architecture: str,
    base: Callable[[str], tuple[PreTrainedModel, BaseSpec]],
    tmp_path: Path,
) -> None:
    model, spec = base(architecture)
    directory = save_adapter(model, tmp_path, **fields_of(case, architecture))
    program = formats.lower(read_checkpoint(directory, LIMITS), spec, LIMITS)
    tuned: Any = PeftModel.from_pretrained(model, directory)
    try:
        compare(program, tuned, spec)
    finally:
        tuned.unload()
        for name, module in model.named_modules():
            if name in spec.biases:
                module.bias.data.copy_(spec.biases[name])


@torch.no_grad()
def compare(program: AdapterProgram, tuned: Any, spec: BaseSpec) -> None:
    """The same modules, deltas and biases."""
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.named_modules()
        if isinstance(module, LoraLayer)
    }
    ours = {module.module: module for module in program.modules}
    assert layers
    assert {name for name, module in ours.items() if module.low_rank is not None} == set(layers)
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default")
        if spec.modules[name].transposed:
            delta = delta.T
        low_rank = ours[name].low_rank
        assert low_rank is not None
        assert delta.abs().max() > 1e-4
        torch.testing.assert_close(low_rank.b @ low_rank.a.float(), delta, rtol=1e-5, atol=1e-6)
        assert ours[name].scale == pytest.approx(layer.scaling["default"])
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module.bias
        for name, module in tuned.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and "lora_" not in name
        and not isinstance(module, LoraLayer)
    }
    assert found.keys() == spec.biases.keys()
    for name, bias in found.items():
        delta = ours[name].bias if name in ours else None
        expected = bias - spec.biases[name]
        if delta is None:
            assert not expected.any(), name
        else:
            torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
