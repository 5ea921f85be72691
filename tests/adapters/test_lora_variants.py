"""What HF PEFT writes beside plain pairs: sorted patterns, copies of the base, its variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from primitives import describe


def tiny_llama(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def save(directory: Path, **fields: Any) -> tuple[PeftModel, BaseSpec]:
    """Saves a random adapter; the model that still carries it, and the base as it was."""
    base = tiny_llama()
    spec = describe(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and name.endswith("bias")):
            parameter.data.normal_()
    model.save_pretrained(directory)
    return model, spec


def lower(directory: Path, spec: BaseSpec) -> AdapterProgram:
    limits = AdapterLimits()
    return formats.lower(read_checkpoint(directory, limits), spec, limits)


def test_the_first_pattern_in_the_file_wins_as_it_does_for_peft(tmp_path: Path) -> None:
    """PEFT sorts the keys of what it saves: with overlapping patterns, a model that is loaded
    again may differ from the one that was trained. What PEFT loads is what counts.
    """
    alphas = {"q_proj": 2, "layers.1.*": 6}
    trained, spec = save(tmp_path, r=2, target_modules=["q_proj"], alpha_pattern=alphas)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    layers = [m.get_submodule(f"base_model.model.{name}") for m in (trained, loaded)]
    assert [layer.scaling["default"] for layer in layers] == [1, 3]
    (ours,) = (m.scale for m in lower(tmp_path, spec).modules if m.module == name)
    assert ours == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_scaled_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, spec = save(tmp_path, r=4, lora_alpha=3, target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    for module in lower(tmp_path, spec).modules:
        layer = model.get_submodule(f"base_model.model.{module.module}")
        assert module.low_rank is not None
        exact = layer.lora_B["default"].weight.float() * 0.75
        assert torch.equal(module.low_rank.b, exact)


@pytest.mark.parametrize("copied", [True, False])
def test_the_output_layer_with_and_without_a_copy_of_its_weights(
    copied: bool, tmp_path: Path
) -> None:
    model, spec = save(tmp_path, r=2, target_modules=["q_proj", "lm_head"])
    if not copied:
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    (head,) = (m for m in lower(tmp_path, spec).modules if m.module == "lm_head")
    assert head.low_rank is not None
    assert head.weight is None
    expected = model.get_submodule("base_model.model.lm_head").get_delta_weight("default")
    torch.testing.assert_close(head.low_rank.b @ head.low_rank.a, expected)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"kasa_config": KasaConfig()}, "kasa_config"),
        ({"monteclora_config": MontecloraConfig()}, "monteclora_config"),
        ({"velora_config": VeloraConfig()}, "velora_config"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}, "use_bdlora"),
    ],
)
def test_variants_that_change_more_are_refused(
    fields: dict[str, Any], where: str, tmp_path: Path
) -> None:
    _, spec = save(tmp_path, **{"r": 2, "target_modules": ["q_proj"]} | fields)
    with pytest.raises(AdapterInvalid) as caught:
        lower(tmp_path, spec)
    assert any(where in refusal.where for refusal in caught.value.refusals)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, spec = save(tmp_path, r=2, target_modules=["q_proj"])
    smaller = {n: m for n, m in spec.modules.items() if ".2." not in n}
    with pytest.raises(AdapterInvalid, match="no such module"):
        lower(tmp_path, BaseSpec("other", spec.digest, "llama", smaller, spec.biases))
