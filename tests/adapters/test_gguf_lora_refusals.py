"""LoRA in GGUF files that cannot be served, or are damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian
from torch import Tensor

from adaplex.adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.sources.gguf.lora import convert_gguf_lora
from adapters.gguf_adapters import F32, HEADS, LIMITS, Q8_0, convert, lowered, pair, write_gguf


@pytest.mark.parametrize(
    ("tensors", "refusals"),
    [
        ({"blk.0.attn_v.weight.lora_a": torch.ones(4, 64)}, ["attn_v.weight.lora_b: half"]),
        ({"blk.0.attn_v.weight.lora_b": torch.ones(32, 4)}, ["attn_v.weight.lora_a: half"]),
        (
            pair("blk.7.attn_v.weight"),
            ["blk.7.attn_v.weight.lora_a: the base has no such linear or embedding"],
        ),
        (pair("token_embd.weight"), [r"lora_a: has shape \[4, 64\], expected \[320, 4\]"]),
        (pair("output_norm.weight"), ["lora_a: the base has no such linear or embedding"]),
        (pair("blk.0.attn_q.weight"), [r"lora_b: has shape \[32, 4\], expected \[64, 4\]"]),
        (
            pair() | {"blk.0.attn_v.weight.lora_a": torch.ones(3, 64)},
            [r"lora_a: has shape \[3, 64\], expected \[4, 64\]"],
        ),
        (pair() | {"blk.9.attn_norm.weight": torch.ones(64)}, ["attn_norm.weight: is not"]),
        (pair() | {"blk.0.attn_v.bias": torch.ones(32)}, ["attn_v.bias: is not a tensor of LoRA"]),
        (pair("rope") | pair("x.weight"), ["rope.lora_a: is not", "x.weight.lora_b: the base"]),
        ({}, ["lora.gguf: has no tensor"]),
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
        ({"invocation": [1.5, 2.5]}, "adapter.alora.invocation_tokens: must be a list of token"),
        ({"invocation": [1] * 1025}, "adapter.alora.invocation_tokens: must be a list of token"),
        ({"alpha": -1.0}, "adapter.lora.alpha: is -1.0, must be"),
        ({"alpha": float("nan")}, "adapter.lora.alpha: is nan, must be"),
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
    with pytest.raises(AdapterInvalid, match="the base has type gpt2; GGUF adapters need one of: "):
        convert(file, tmp_path / "into", BaseSpec("tiny", "digest", "gpt2", llama.modules))


def test_ggml_may_leave_out_the_one_row_of_a_rank_of_one(llama: BaseSpec, tmp_path: Path) -> None:
    flat = pair(rank=1) | {"blk.0.attn_v.weight.lora_a": torch.arange(64.0)}
    into = convert(write_gguf(tmp_path / "lora.gguf", flat), tmp_path / "into", llama)
    (found,) = lowered(into, llama).values()
    assert torch.equal(found.a, torch.arange(64.0)[None])


def test_rows_are_not_reordered_by_a_guess(llama: BaseSpec, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair())
    with pytest.raises(AdapterInvalid, match="no number of heads to reorder its rows"):
        convert_gguf_lora(file, tmp_path / "into", llama, LIMITS, heads=HEADS, kv_heads=0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (AdapterLimits(max_rank=3), "lora_b has rank 4, the limit is 3"),
        (AdapterLimits(max_tensors=1), "lora.gguf has 2 tensors, the limit is 1"),
        (AdapterLimits(max_adapter_bytes=1000), "bytes, the limit is 1000"),
        (AdapterLimits(max_header_bytes=100), "exceeds the limit of 100 bytes"),
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
        with pytest.raises(AdapterInvalid, match=r"cut short|ends at byte|is not a GGUF file"):
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
