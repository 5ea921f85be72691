"""Adapters of multimodal bases, and names of earlier versions of transformers, against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from primitives import describe, logits

LIMITS = AdapterLimits()
IDLE = ("model.vision_tower", "model.multi_modal_projector")
TOKENS = [5, 9, 60, 33]
OLD = (
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.model.vision_tower.", "base_model.model.vision_tower."),
)


@pytest.fixture(scope="module")
def gemma3() -> PreTrainedModel:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    return model.eval()  # type: ignore[no-any-return]


def save(model: PreTrainedModel, config: Any, folder: Path) -> Path:
    torch.manual_seed(1)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    tuned.save_pretrained(folder)
    return folder


def lower(folder: Path, model: PreTrainedModel) -> AdapterProgram:
    spec = describe(model, idle=IDLE)
    sites = {n: m for n, m in spec.modules.items() if not n.startswith(IDLE)}
    base = describe(model, idle=IDLE, modules=sites)
    return formats.lower(read_checkpoint(folder, LIMITS), base, LIMITS)


CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "bias": peft.LoraConfig(target_modules=["q_proj"], bias="lora_only"),
    "saved-projector": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]
    ),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_of_the_vision_tower_change_no_text(
    name: str, gemma3: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save(gemma3, CONFIGS[name], tmp_path)
    oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(gemma3), folder).eval()
    expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    program = lower(folder, gemma3)
    torch.testing.assert_close(logits(gemma3, program, TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert any("of model.vision_tower have no effect on text" in note for note in program.notes)
    assert not any(module.module.startswith(IDLE) for module in program.modules)


@torch.no_grad()
def test_names_of_earlier_versions_are_pefts(gemma3: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(gemma3, CONFIGS["lora"], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for new, old in OLD:
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(gemma3), folder).eval()
    expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    program = lower(folder, gemma3)
    found = logits(gemma3, program, TOKENS)
    assert (found - gemma3(torch.tensor([TOKENS])).logits[0, -1]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_tower_that_the_base_lacks_is_refused(gemma3: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(gemma3, CONFIGS["lora"], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors = {key.replace("vision_tower", "audio_tower"): t for key, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterInvalid, match="audio_tower"):
        lower(folder, gemma3)
