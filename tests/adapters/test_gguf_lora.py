"""LoRA in GGUF files, written as llama.cpp does, against the PEFT adapter it came from."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from adaplex.adapters import formats
from adaplex.adapters.base_spec import BaseModule, BaseSpec
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from adaplex.adapters.gguf_lora import ARCHITECTURES, convert_gguf_lora
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.primitives import LowRank
from peft_adapters import everything, load_plain, save_adapter

LIMITS = AdapterLimits()
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32, F16, BF16, Q8_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
EVERY = everything("llama")


def gguf_name(module: str) -> str:
    """llama.cpp's name of a module of a llama-shaped model."""
    if module == "lm_head":
        return "output"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(rows: Tensor) -> Tensor:
    """Row i of half h of a head goes to row 2i + h of that head."""
    made, half = torch.empty_like(rows), HEAD_SIZE // 2
    for row in range(len(rows)):
        head, within = divmod(row, HEAD_SIZE)
        h, i = divmod(within, half)
        made[head * HEAD_SIZE + 2 * i + h] = rows[row]
    return made


def drop_base_weights(directory: Path) -> None:
    """PEFT copies the base's weight beside a pair on lm_head; llama.cpp leaves it out."""
    tensors = load_file(directory / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "base_layer" not in k}, directory / WEIGHTS)


def pairs_of(directory: Path, architecture: str) -> dict[str, Tensor]:
    """A PEFT adapter's tensors under llama.cpp's names, in its order of rows."""
    made = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        module, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        rotary = architecture == "llama" and module.endswith(("q_proj", "k_proj"))
        if rotary and half.startswith("B"):
            tensor = interleaved(tensor)
        made[f"{gguf_name(module)}.weight.lora_{half[0].lower()}"] = tensor
    return made


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    kind: GGMLQuantizationType = F32,
    *,
    architecture: str = "llama",
    alpha: float | None = 8.0,
    general_type: str = "adapter",
    adapter_type: str = "lora",
    invocation: list[int] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """What convert_lora_to_gguf.py writes; rows that make no block of `kind` are kept in F16."""
    writer = GGUFWriter(path, architecture, endianess=endian)
    writer.add_type(general_type)
    writer.add_string("adapter.type", adapter_type)
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/tiny")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if invocation is not None:
        writer.add_array("adapter.alora.invocation_tokens", invocation)
    for name, tensor in tensors.items():
        stored = F16 if kind is Q8_0 and tensor.shape[-1] % 32 else kind
        writer.add_tensor(name, quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(model: nn.Module, architecture: str) -> BaseSpec:
    linears = {
        name: BaseModule(name, "linear", module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return BaseSpec("tiny", "digest", architecture, linears)


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[PreTrainedModel, BaseSpec]]:
    @cache
    def load(architecture: str) -> tuple[PreTrainedModel, BaseSpec]:
        model = load_plain(tiny_model(architecture))
        return model, describe(model, architecture)

    return load


@pytest.fixture(scope="module")
def llama(base: Callable[[str], tuple[PreTrainedModel, BaseSpec]]) -> BaseSpec:
    return base("llama")[1]


def convert(file: Path, into: Path, base: BaseSpec, limits: AdapterLimits = LIMITS) -> Path:
    convert_gguf_lora(file, into, base, limits, heads=HEADS, kv_heads=KV_HEADS)
    return into


def lowered(directory: Path, base: BaseSpec) -> dict[str, LowRank]:
    program = formats.lower(read_checkpoint(directory, LIMITS), base, LIMITS)
    pairs = {module.module: module.low_rank for module in program.modules}
    assert pairs
    return {name: pair for name, pair in pairs.items() if pair is not None}


def assert_same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert torch.equal(found[name].a, pair.a), name
        assert torch.equal(found[name].b, pair.b), name


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
    whole = describe(model, model_type)
    projections = sorted(name for name in whole.modules if name.endswith("_proj"))
    assert len(projections) >= 8
    modules = {name: BaseModule(name, "linear", 64, 32) for name in projections}
    kept_as = ARCHITECTURES[model_type]
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == kept_as)
    names = get_tensor_name_map(arch, 2)
    tensors = {k: v for name in projections for k, v in pair(f"{names[name]}.weight").items()}
    file = write_gguf(tmp_path / "lora.gguf", tensors, architecture=kept_as)
    into = convert(file, tmp_path / "into", BaseSpec("tiny", "digest", model_type, modules))
    assert json.loads((into / CONFIG).read_text())["target_modules"] == projections


def pair(name: str = "blk.0.attn_v.weight", rank: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lora_a": torch.ones(rank, 64), f"{name}.lora_b": torch.ones(32, rank)}


@pytest.mark.parametrize(
    ("tensors", "refusals"),
    [
        ({"blk.0.attn_v.weight.lora_a": torch.ones(4, 64)}, ["attn_v.weight.lora_b: half"]),
        ({"blk.0.attn_v.weight.lora_b": torch.ones(32, 4)}, ["attn_v.weight.lora_a: half"]),
        (pair("blk.7.attn_v.weight"), ["blk.7.attn_v.weight.lora_a: the base has no such linear"]),
        (pair("token_embd.weight"), ["token_embd.weight.lora_a: LoRA on embeddings"]),
        (pair("blk.0.attn_q.weight"), [r"lora_b: has shape \[32, 4\], expected \[64, 4\]"]),
        (
            pair() | {"blk.0.attn_v.weight.lora_a": torch.ones(3, 64)},
            [r"lora_a: has shape \[3, 64\], expected \[4, 64\]"],
        ),
        (pair() | {"blk.0.attn_norm.weight": torch.ones(64)}, ["needs replaced norm weights"]),
        (pair() | {"blk.0.attn_v.bias": torch.ones(32)}, ["attn_v.bias: is not a tensor of LoRA"]),
        (pair("rope") | pair("x.weight"), ["rope.lora_a: is not", "x.weight.lora_b: the base"]),
        ({}, ["lora.gguf: holds no tensor"]),
    ],
)
def test_what_fits_no_place_is_refused_by_name(
    tensors: dict[str, Tensor], refusals: list[str], llama: BaseSpec, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "lora.gguf", tensors)
    for refusal in refusals:
        with pytest.raises(AdapterInvalid, match=refusal):
            convert(file, tmp_path / "into", llama)
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    ("metadata", "refusal"),
    [
        ({"general_type": "model"}, "general.type: is 'model', expected 'adapter'"),
        ({"adapter_type": "cvec"}, "adapter.type: is 'cvec', expected 'lora'"),
        ({"architecture": "qwen2"}, "general.architecture: is 'qwen2', expected 'llama'"),
        ({"invocation": [1, 2]}, "adapter.alora.invocation_tokens: activated LoRA"),
        ({"alpha": -1.0}, "adapter.lora.alpha: must be"),
        ({"alpha": float("nan")}, "adapter.lora.alpha: must be"),
        ({"endian": GGUFEndian.BIG}, "lora.gguf: has version 50331648"),
    ],
)
def test_metadata_that_cannot_be_served_is_named(
    metadata: dict[str, Any], refusal: str, llama: BaseSpec, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair(), **metadata)
    with pytest.raises(AdapterInvalid, match=refusal):
        convert(file, tmp_path / "into", llama)


def test_a_base_that_llama_cpp_keeps_otherwise_takes_none(llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair(), architecture="gpt2")
    with pytest.raises(AdapterInvalid, match="a base of type gpt2 takes no GGUF adapters"):
        convert(file, tmp_path / "into", BaseSpec("tiny", "digest", "gpt2", llama.modules))


def test_ggml_may_leave_out_the_one_row_of_a_rank_of_one(llama: BaseSpec, tmp_path: Path) -> None:
    flat = pair(rank=1) | {"blk.0.attn_v.weight.lora_a": torch.arange(64.0)}
    into = convert(write_gguf(tmp_path / "lora.gguf", flat), tmp_path / "into", llama)
    (found,) = lowered(into, llama).values()
    assert torch.equal(found.a, torch.arange(64.0)[None])


def test_rows_are_not_reordered_by_a_guess(llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair())
    with pytest.raises(AdapterInvalid, match="rows need the heads"):
        convert_gguf_lora(file, tmp_path / "into", llama, LIMITS, heads=HEADS, kv_heads=0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (AdapterLimits(max_rank=3), "lora_b has rank 4, the limit is 3"),
        (AdapterLimits(max_tensors=1), "lora.gguf has 2 tensors, the limit is 1"),
        (AdapterLimits(max_adapter_bytes=1000), "bytes, the limit is 1000"),
        (AdapterLimits(max_header_bytes=100), "more bytes than the limit, 100"),
    ],
)
def test_limits_hold(limits: AdapterLimits, message: str, llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair())
    with pytest.raises(AdapterTooLarge, match=message):
        convert(file, tmp_path / "into", llama, limits)


def test_quantized_tensors_count_as_large_as_they_become(llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair(rank=32), Q8_0)
    limit = file.stat().st_size + 1000
    with pytest.raises(AdapterTooLarge, match=f"take 12288 bytes, the limit is {limit}"):
        convert(file, tmp_path / "into", llama, AdapterLimits(max_adapter_bytes=limit))


def test_a_file_cut_anywhere_is_refused(llama: BaseSpec, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "lora.gguf", pair()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 600, 5), len(whole) - 300]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdapterInvalid, match=r"cut short|beyond the end|is no GGUF file"):
            convert(cut, tmp_path / "into", llama)


def test_a_kind_that_is_no_weight_is_refused(llama: BaseSpec, tmp_path: Path) -> None:
    name = "blk.0.attn_v.weight.lora_a"
    file = write_gguf(tmp_path / "lora.gguf", pair())
    whole = file.read_bytes()
    place = whole.index(name.encode()) + len(name) + 4 + 16
    assert whole[place : place + 4] == struct.pack("<I", F32)
    file.write_bytes(
        whole[:place] + struct.pack("<I", GGMLQuantizationType.I32) + whole[place + 4 :]
    )
    with pytest.raises(AdapterInvalid, match=f"{name}: has type I32"):
        convert(file, tmp_path / "into", llama)


def test_damage_is_told_as_an_error_of_ours(llama: BaseSpec, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "lora.gguf", pair()).read_bytes()
    data, file = len(whole) - 1536, tmp_path / "damaged.gguf"
    refused = 0
    for seed in range(400):
        chance, damaged = random.Random(seed), bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(data)] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            convert(file, tmp_path / "into", llama)
        except AdapterError:
            refused += 1
    assert 100 < refused < 400
