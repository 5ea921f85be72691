"""LoRA in GGUF files as llama.cpp writes them, compared with the PEFT adapter of origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.sources.gguf.lora import ARCHITECTURES
from adapters.gguf_adapters import (
    BF16,
    F16,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    LIMITS,
    Q8_0,
    convert,
    lowered,
    pair,
    pairs_of,
    write_gguf,
)
from peft_adapters import everything, save_adapter
from primitives import describe

EVERY = everything("llama")


def drop_base_weights(directory: Path) -> None:
    """Removes the base's weight that PEFT saves with a pair on lm_head; llama.cpp has none."""
    tensors = load_file(directory / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "base_layer" not in k}, directory / WEIGHTS)


def assert_same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.equal(found[name].a, delta.a), name
        assert torch.equal(found[name].b, delta.b), name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": EVERY},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "lm_head"]},
        {"r": 1, "lora_alpha": 8, "target_modules": ["k_proj"], "layers_to_transform": [1]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": EVERY,
            "rank_pattern": {"layers.1.*": 5, "q_proj": 3},
        },
    ],
    ids=["all", "head", "rank-1", "mixed-ranks"],
)
def test_an_import_lowers_to_what_peft_wrote(
    architecture: str,
    fields: dict[str, Any],
    base: Callable[[str], tuple[PreTrainedModel, BaseSpec]],
    tmp_path: Path,
) -> None:
    model, spec = base(architecture)
    original = save_adapter(model, tmp_path / "peft", **fields)
    drop_base_weights(original)
    kept_as = ARCHITECTURES[architecture]
    file = write_gguf(tmp_path / "lora.gguf", pairs_of(original, kept_as), architecture=kept_as)
    assert_same(lowered(convert(file, tmp_path / "into", spec), spec), lowered(original, spec))


def test_rows_are_put_back_as_transformers_does(llama: BaseSpec, tmp_path: Path) -> None:
    tensors = {
        f"blk.0.{name}.weight.lora_{half}": torch.randn(shape)
        for name, rows in (("attn_q", HEADS), ("attn_k", KV_HEADS))
        for half, shape in (("a", (4, 64)), ("b", (rows * HEAD_SIZE, 4)))
    }
    into = convert(write_gguf(tmp_path / "lora.gguf", tensors), tmp_path / "into", llama)
    found = load_file(into / WEIGHTS)
    theirs = LlamaTensorProcessor({"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS})
    for letter in "qk":
        rows = tensors[f"blk.0.attn_{letter}.weight.lora_b"].numpy()
        expected = theirs.process(rows, f"blk.0.attn_{letter}.weight").weights
        key = f"base_model.model.model.layers.0.self_attn.{letter}_proj.lora_B.weight"
        assert np.array_equal(found[key].numpy(), expected)
        assert not np.array_equal(found[key].numpy(), rows)


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0])
def test_other_dtypes_are_read_as_close_as_they_are(
    kind: GGMLQuantizationType,
    base: Callable[[str], tuple[PreTrainedModel, BaseSpec]],
    tmp_path: Path,
) -> None:
    model, spec = base("llama")
    original = save_adapter(
        model, tmp_path / "peft", r=32, lora_alpha=8, target_modules=EVERY, rank_pattern={"0.*": 6}
    )
    file = write_gguf(tmp_path / "lora.gguf", pairs_of(original, "llama"), kind)
    into = convert(file, tmp_path / "into", spec)
    step = {F16: 2**-11, BF16: 2**-8, Q8_0: 1 / 250}[kind]
    expected = load_file(original / WEIGHTS)
    for key, tensor in load_file(into / WEIGHTS).items():
        assert tensor.dtype is {F16: torch.float16, BF16: torch.bfloat16}.get(
            kind, torch.float16 if expected[key].shape[-1] % 32 else torch.float32
        )
        worst = (tensor.float() - expected[key]).abs().max()
        assert 0 < worst <= step * expected[key].abs().max(), key
    assert len(lowered(into, spec)) == 21


@pytest.mark.parametrize(
    ("alpha", "scales"), [(8.0, [2.0, 4.0]), (0.0, [1.0, 1.0]), (None, [1.0, 1.0])]
)
def test_alpha_scales_by_each_rank_and_none_means_one(
    alpha: float | None, scales: list[float], llama: BaseSpec, tmp_path: Path
) -> None:
    tensors = {
        f"blk.{layer}.attn_v.weight.lora_{half}": torch.ones(shape)
        for layer, rank in enumerate((4, 2))
        for half, shape in (("a", (rank, 64)), ("b", (32, rank)))
    }
    file = write_gguf(tmp_path / "lora.gguf", tensors, alpha=alpha)
    into = convert(file, tmp_path / "into", llama)
    program = formats.lower(read_checkpoint(into, LIMITS), llama, LIMITS)
    assert [module.scale for module in program.modules] == scales
    config = json.loads((into / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "https://huggingface.co/org/tiny"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_linear_of_an_architecture_has_a_name_of_its_own(
    model_type: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = (name for name, m in describe(model).modules.items() if m.kind == "linear")
    projections = sorted(name for name in linears if name.endswith("_proj"))
    assert len(projections) >= 8
    modules = {name: BaseModule(name, "linear", 64, 32) for name in projections}
    kept_as = ARCHITECTURES[model_type]
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == kept_as)
    names = get_tensor_name_map(arch, 2)
    tensors = {k: v for name in projections for k, v in pair(f"{names[name]}.weight").items()}
    file = write_gguf(tmp_path / "lora.gguf", tensors, architecture=kept_as)
    into = convert(file, tmp_path / "into", BaseSpec("tiny", "digest", model_type, modules))
    assert json.loads((into / CONFIG).read_text())["target_modules"] == projections


def test_activated_lora_is_read_as_in_pefts_format(llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair(), invocation=[5, 6])
    program = formats.lower(
        read_checkpoint(convert(file, tmp_path / "into", llama), LIMITS), llama, LIMITS
    )
    assert (program.family, program.invocation) == ("alora", (5, 6))


def test_pairs_of_the_embedding_are_pefts(
    base: Callable[[str], tuple[PreTrainedModel, BaseSpec]], tmp_path: Path
) -> None:
    model, spec = base("llama")
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}
    save_adapter(model, tmp_path, **fields)
    drop_base_weights(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    table = {key: tensors.pop(key) for key in list(tensors) if "embed_tokens" in key}
    a, b = (table[f"base_model.model.model.embed_tokens.lora_embedding_{half}"] for half in "AB")
    stored = {"token_embd.weight.lora_a": a.T.contiguous(), "token_embd.weight.lora_b": b}
    save_file(tensors, tmp_path / WEIGHTS)
    file = write_gguf(tmp_path / "lora.gguf", pairs_of(tmp_path, "llama") | stored)
    save_file(tensors | table, tmp_path / WEIGHTS)
    assert_same(lowered(convert(file, tmp_path / "into", spec), spec), lowered(tmp_path, spec))


@pytest.mark.parametrize(("architecture", "shift"), [("llama", 0.0), ("gemma2", 1.0)])
def test_norms_replace_those_of_the_base(
    architecture: str,
    shift: float,
    base: Callable[[str], tuple[PreTrainedModel, BaseSpec]],
    tmp_path: Path,
) -> None:
    _, spec = base(architecture)
    norm = torch.rand(64)
    stored = {"blk.1.attn_norm.weight": norm + shift}
    file = write_gguf(tmp_path / "lora.gguf", pair() | stored, architecture=architecture)
    into = convert(file, tmp_path / "into", spec)
    program = formats.lower(read_checkpoint(into, LIMITS), spec, LIMITS)
    (found,) = [module for module in program.modules if module.weight is not None]
    assert found.module == "model.layers.1.input_layernorm"
    torch.testing.assert_close(found.weight, norm)
